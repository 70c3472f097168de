"""Community forks of OpenMMLab's packages, which use the same import names."""

import warnings
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Dict

import torch
from mmengine.utils import digit_version

from ..version import DISTRIBUTIONS


def distributions(name: str) -> Dict[str, str]:
    """Find the installed distributions that provide a package.

    Args:
        name (str): Import name, a key of ``mmela.version.DISTRIBUTIONS``.

    Returns:
        dict[str, str]: Versions by name of the distribution.
    """
    versions = {}
    for distribution in DISTRIBUTIONS[name]:
        try:
            versions[distribution] = version(distribution)
        except PackageNotFoundError:
            pass
    return versions


def warn_of_mixtures() -> None:
    """Warn if a release and its fork are installed together."""
    for name in DISTRIBUTIONS:
        installed = list(distributions(name))
        if len(installed) > 1:
            warnings.warn(
                f'{" and ".join(installed)} are installed together and overwrite '
                f"each other's files of {name}; uninstall them and install only one",
                stacklevel=2,
            )


def keep_loading_safe() -> None:
    """Make onedl-mmengine reject checkpoints that could run code.

    If torch, from version 2.6 on, rejects a file, onedl-mmengine loads it again with
    ``weights_only=False``. Checkpoints of mmengine no longer need that, see
    :mod:`mmela.compat.checkpoints`.
    """
    if 'onedl-mmengine' not in distributions('mmengine'):
        return  # do not import mmengine.runner for others
    if digit_version(torch.__version__) < digit_version('2.6.0'):
        return
    module = import_module('mmengine.runner.checkpoint')
    if hasattr(module, '_safe_torch_load'):
        module._safe_torch_load = partial(torch.load, weights_only=True)
