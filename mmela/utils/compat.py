import runpy
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Callable, Dict, Optional, Tuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version

from ..version import SUPPORTED

_REQUIRED = ('torch', 'mmengine', 'mmcv')


def check_versions(supported: Optional[Dict[str, Tuple[str, str]]] = None) -> None:
    """Check the versions of the packages that mmela works with.

    The import name decides, whatever the distribution is called. Packages
    that are not installed are passed over unless mmela cannot do without them.

    Args:
        supported (dict[str, tuple[str, str]], optional): First supported and
            first unsupported version of each package. Defaults to
            ``mmela.version.SUPPORTED``.

    Raises:
        ImportError: If a package is missing or its version is not supported.
    """
    for name, (first, last) in (supported or SUPPORTED).items():
        if find_spec(name) is None:
            if name in _REQUIRED:
                raise ImportError(
                    f'mmela needs {name} >= {first}, < {last}, which is not installed'
                )
            continue
        version = find_version(name)
        if not digit_version(first) <= digit_version(version) < digit_version(last):
            raise ImportError(
                f'mmela needs {name} >= {first}, < {last}, but '
                f'{name} {version} is installed'
            )


def find_version(name: str) -> str:
    """Version of an installed package.

    It is read from the package's ``version.py``, which all of OpenMMLab's
    have, so that a toolbox is not imported to look at its version.

    Args:
        name (str): Import name.

    Returns:
        str: The version.
    """
    if name not in sys.modules:
        path = Path(find_spec(name).origin or '').with_name('version.py')
        if path.is_file():
            version = runpy.run_path(str(path)).get('__version__')
            if isinstance(version, str):
                return version
    return import_module(name).__version__


def _statistic(owner: type, name: str) -> Callable:
    """Stand-in for ``getattr`` in checkpoints: statistics of a log history.

    mmengine pickles the methods of :class:`HistoryBuffer` by ``getattr``. The
    real one would hand a malicious file any attribute of anything.
    """
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(owner, name)
    raise UnpicklingError(f'getattr({owner}, {name!r}) is not allowed in a checkpoint')


def allow_checkpoint_classes() -> None:
    """Let ``torch.load`` read the checkpoints that mmengine writes.

    From version 2.6, torch loads nothing but tensors and plain containers
    unless a class is allowed by name. mmengine keeps the log history in its
    checkpoints, which consists of the classes allowed here. None of them runs
    code of the file's choosing.
    """
    if digit_version(torch.__version__) < digit_version('2.6.0'):
        return  # loads everything, for good or ill
    try:
        from numpy._core import multiarray
    except ImportError:  # numpy < 2
        from numpy.core import multiarray
    dtypes = {
        type(np.dtype(code))
        for code in ('bool', 'int32', 'int64', 'float32', 'float64')
    }
    # numpy 1 and 2 name their functions differently, also in files
    functions = [
        (getattr(multiarray, name), f'numpy.{core}.multiarray.{name}')
        for name in ('_reconstruct', 'scalar')
        for core in ('core', '_core')
    ]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *dtypes,
            *functions,
            (_statistic, 'builtins.getattr'),
        ]
    )
