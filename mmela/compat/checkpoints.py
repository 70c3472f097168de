from pickle import UnpicklingError
from typing import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version


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
