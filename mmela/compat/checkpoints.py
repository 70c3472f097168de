"""Read checkpoints without running code from them.

From version 2.6 on, torch loads only tensors and plain containers unless a class is
allowed by name. But mmengine stores its log history in each checkpoint, as objects of
its own and of numpy, and DeiT's script stores its arguments, an
``argparse.Namespace``. numpy's classes are not safe with hostile data: their
``__setstate__`` trusts sizes, flags and memory from the file, and may be called again
while the memory is in use. So this module allows stand-ins instead. They accept what
numpy and mmengine write, use only numpy's public functions, and reject everything
else.
"""

import warnings
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Callable, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version

from .loaders import local_checkpoint, read_safetensors

_LOADS_SAFELY = digit_version(torch.__version__) >= digit_version('2.6.0')
# Kinds and sizes of numbers that a checkpoint may hold, as numpy writes them
_TYPE_CODES = {
    *('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8'),
    *('f2', 'f4', 'f8', 'c8', 'c16'),
}
_STATISTICS = ('min', 'max', 'current', 'mean')


def load_checkpoint(path: Union[str, Path]) -> Any:
    """Read a checkpoint to the CPU.

    Args:
        path (str | Path): A file written by ``torch.save``, or one ending with
            ``.safetensors``; also on the Hugging Face Hub, see
            :func:`~mmela.compat.loaders.local_checkpoint`.

    Returns:
        Any: Its content.

    Raises:
        ImportError: If safetensors or huggingface_hub is needed and not
            installed.
        OSError: If the file cannot be opened or downloaded.
        ValueError: If the file is damaged or not a checkpoint, or holds an object that
            is not allowed; the message names it.
    """
    path = local_checkpoint(path)
    if path.suffix == '.safetensors':
        return read_safetensors(path)
    with open(path, 'rb'):
        pass  # any error after this is due to the content
    if not _LOADS_SAFELY:
        warnings.warn(
            f'torch {torch.__version__} runs code that {path} may contain. Load only '
            'files that you trust, use safetensors, or upgrade torch to 2.6 or newer',
            stacklevel=2,
        )
    try:
        return torch.load(path, map_location='cpu', weights_only=_LOADS_SAFELY)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f'{path} {_reason(error)}') from error


def _reason(error: Exception) -> str:
    """Explain what is wrong with a file."""
    words = str(error).split()
    if 'GLOBAL' in words[:-1]:
        name = words[words.index('GLOBAL') + 1][:99]
        return f'holds {name}, which could run code and is not allowed'
    if isinstance(error, UnpicklingError):
        return 'is not a checkpoint, is damaged, or contains code'
    return 'is not a checkpoint or is damaged'


class SavedDtype:
    """Stand-in for ``numpy.dtype``: the type of plain numbers.

    Args:
        code (str): Kind and size in bytes, such as ``'f8'``.
        align (bool): Written by numpy, but not used.
        copy (bool): Written by numpy, but not used.

    Attributes:
        dtype (numpy.dtype): The type.

    Raises:
        UnpicklingError: If it is not a type of plain numbers.
    """

    def __new__(cls, code: str, align: bool = False, copy: bool = True) -> 'SavedDtype':
        if not isinstance(code, str) or code not in _TYPE_CODES:
            raise UnpicklingError(
                f'the numpy type {code!r:.99} is not allowed in a checkpoint'
            )
        self = super().__new__(cls)
        self.dtype = np.dtype(code)
        return self

    def __setstate__(self, state: tuple) -> None:
        # Version, byte order, no fields of other types, no flags
        if state not in [(3, order, None, None, None, -1, -1, 0) for order in '<>|']:
            raise UnpicklingError('a numpy type in the checkpoint is damaged')
        self.dtype = self.dtype.newbyteorder(state[1])


def _dtype(saved: Any) -> np.dtype:
    if isinstance(saved, np.dtype):  # a script has allowed numpy's class
        return SavedDtype(saved.str[1:]).dtype.newbyteorder(saved.str[0])
    if not isinstance(saved, SavedDtype):
        raise UnpicklingError('numbers in the checkpoint have no numpy type')
    return saved.dtype


def _numbers(saved_dtype: Any, raw: Any) -> np.ndarray:
    """Convert bytes to numbers, (N,)."""
    dtype = _dtype(saved_dtype)
    # numpy relies on bools being 0 or 1, for example to allocate memory for a mask
    if type(raw) is not bytes or (dtype.kind == 'b' and raw.strip(b'\0\1')):
        raise UnpicklingError('numbers in the checkpoint are damaged')
    return np.frombuffer(raw, dtype)


class SavedArray(np.ndarray):
    """Stand-in for ``numpy.ndarray``: an array of plain numbers.

    It is an ``ndarray`` and is saved as one.
    """

    _filled = False

    def __new__(cls, *args, **kwargs):
        raise UnpicklingError('an array in the checkpoint is damaged')

    def __setstate__(self, state: tuple) -> None:
        # Only once, because it releases memory that a tensor may share by then
        if self._filled or self.size or not isinstance(state, tuple):
            raise UnpicklingError('an array in the checkpoint is damaged')
        self._filled = True
        try:
            _, shape, dtype, is_fortran, raw = state
            numbers = _numbers(dtype, raw)
            numbers = numbers.reshape(shape, order='F' if is_fortran is True else 'C')
        except (TypeError, ValueError) as error:
            raise UnpicklingError('an array in the checkpoint is damaged') from error
        # A state written by numpy itself
        super().__setstate__(numbers.__reduce__()[2])

    def __reduce_ex__(self, protocol: int) -> tuple:
        return np.asarray(self).__reduce_ex__(protocol)


def _reconstruct(subtype: type, shape: tuple, code: Any) -> SavedArray:
    """Stand-in for ``numpy.core.multiarray._reconstruct``: an empty array."""
    # On constant memory, until __setstate__ brings the numbers
    return np.ndarray.__new__(SavedArray, 0, np.uint8, b'')


def _scalar(dtype: SavedDtype, raw: bytes) -> np.generic:
    """Stand-in for ``numpy.core.multiarray.scalar``: a number."""
    try:
        (number,) = _numbers(dtype, raw)
    except (TypeError, ValueError) as error:
        raise UnpicklingError('a number in the checkpoint is damaged') from error
    return number


def _no_bytes() -> bytes:
    """Stand-in for ``bytes``, which Python calls for an empty array."""
    return b''


class SavedHistory(HistoryBuffer):
    """Stand-in for mmengine's ``HistoryBuffer``, which it becomes.

    It ignores the names of statistics in the file, since mmengine would set them for
    all histories of the process.
    """

    def __init__(self, *args, **kwargs) -> None:
        raise UnpicklingError('a log history in the checkpoint is damaged')

    def __setstate__(self, state: dict) -> None:
        if not isinstance(state, dict):
            raise UnpicklingError('a log history in the checkpoint is damaged')
        state = {k: v for k, v in state.items() if k != 'statistics_methods'}
        logs, counts = state.get('_log_history'), state.get('_count_history')
        if (
            set(state) != {'max_length', '_log_history', '_count_history'}
            or type(state['max_length']) is not int
            or state['max_length'] < 1
            or not all(isinstance(array, np.ndarray) for array in (logs, counts))
            or not logs.shape == counts.shape == (logs.size,)
        ):
            raise UnpicklingError('a log history in the checkpoint is damaged')
        state.update(_log_history=np.array(logs), _count_history=np.array(counts))
        self.__class__ = HistoryBuffer
        self.__setstate__(state)


def _statistic(owner: type, name: str) -> Callable:
    """Stand-in for ``getattr`` in checkpoints, for statistics of a log history.

    mmengine pickles the methods of :class:`HistoryBuffer` with ``getattr``. The real
    ``getattr`` would give a malicious file any attribute of any object.
    """
    if owner in (HistoryBuffer, SavedHistory) and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise UnpicklingError(
        f'getattr({owner!r:.99}, {name!r:.99}) is not allowed in a checkpoint'
    )


class SavedArguments(Namespace):
    """Stand-in for ``argparse.Namespace``, which it becomes.

    Training scripts store their arguments in a checkpoint, DeiT's under ``args``.
    """

    def __init__(self, *args, **kwargs) -> None:
        raise UnpicklingError('the arguments of a script are damaged')

    def __setstate__(self, state: dict) -> None:
        # No argument has a name with a special meaning in Python
        if type(state) is not dict or not all(
            type(name) is str and not name.startswith('__') for name in state
        ):
            raise UnpicklingError('the arguments of a script are damaged')
        self.__class__ = Namespace
        vars(self).update(state)


def allow_checkpoint_classes() -> None:
    """Let ``torch.load`` read the checkpoints that mmengine and DeiT write.

    It allows the stand-ins of this module under the names of the original classes.
    None of them runs code chosen by a file. Before torch 2.6, which loads everything,
    this does nothing.
    """
    if not _LOADS_SAFELY:
        return
    # Also under their own names, so that they stay allowed if a script allows the
    # original classes, which may or may not replace them.
    standins = [SavedArguments, SavedArray, SavedDtype, SavedHistory]
    names = [
        (SavedArguments, 'argparse.Namespace'),
        (SavedArray, 'numpy.ndarray'),
        (SavedDtype, 'numpy.dtype'),
        (SavedHistory, f'{HistoryBuffer.__module__}.HistoryBuffer'),
        (_statistic, 'builtins.getattr'),
        (_no_bytes, 'builtins.bytes'),
    ]
    # numpy 1 and 2 use different function names in files
    for core in ('core', '_core'):
        names.append((_reconstruct, f'numpy.{core}.multiarray._reconstruct'))
        names.append((_scalar, f'numpy.{core}.multiarray.scalar'))
    torch.serialization.add_safe_globals([*standins, *names])
