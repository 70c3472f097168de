"""The community's forks of OpenMMLab's packages, under the same import names."""

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
        dict[str, str]: Their versions by their names.
    """
    found = {}
    for distribution in DISTRIBUTIONS[name]:
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            pass
    return found


def warn_of_mixtures() -> None:
    """Warn where a release and its fork have overwritten each other's files."""
    for name in DISTRIBUTIONS:
        found = list(distributions(name))
        if len(found) > 1:
            warnings.warn(
                f'{" and ".join(found)} are both installed, and both have the '
                f'files of {name}: uninstall both, then install one of them',
                stacklevel=2,
            )


def keep_loading_safe() -> None:
    """Have onedl-mmengine refuse checkpoints that could run code.

    Where torch refuses a file, from version 2.6 on, onedl-mmengine loads it all
    the same, with ``weights_only=False``. What mmengine itself writes needs that
    no more, see :mod:`mmela.compat.checkpoints`.
    """
    if 'onedl-mmengine' not in distributions('mmengine'):
        return  # where it is to be imported late, if at all
    if digit_version(torch.__version__) < digit_version('2.6.0'):
        return
    module = import_module('mmengine.runner.checkpoint')
    if hasattr(module, '_safe_torch_load'):
        module._safe_torch_load = partial(torch.load, weights_only=True)
