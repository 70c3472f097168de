"""Reading checkpoints without running what is in them.

From version 2.6, torch loads nothing but tensors and plain containers unless
a class is allowed by name. mmengine keeps the history of its logs in each
checkpoint: objects of its own and of numpy. DeiT's script keeps its arguments, an
``argparse.Namespace``. numpy's classes are not made for hostile data: their
``__setstate__`` takes sizes, flags and memory as the file gives them, also a
second time while somebody holds the memory. So stand-ins are allowed in their
place, which take what numpy and mmengine write, through numpy's public functions,
and refuse the rest.
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
# Kind and size of the numbers that a checkpoint may hold, as numpy writes them
_TYPE_CODES = {
    *('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8'),
    *('f2', 'f4', 'f8', 'c8', 'c16'),
}
_STATISTICS = ('min', 'max', 'current', 'mean')


def load_checkpoint(path: Union[str, Path]) -> Any:
    """Read a checkpoint to the CPU, for a tool.

    Args:
        path (str | Path): A file that ``torch.save`` has written, or one of
            safetensors, ending with ``.safetensors``; on the Hugging Face Hub
            too, see :func:`~mmela.compat.loaders.local_checkpoint`.

    Returns:
        Any: What it holds.

    Raises:
        ImportError: If safetensors or huggingface_hub is needed and not
            installed.
        OSError: If the file cannot be opened or downloaded.
        ValueError: If the file is damaged, no checkpoint, or holds an object
            that is not allowed, which the message names.
    """
    path = local_checkpoint(path)
    if path.suffix == '.safetensors':
        return read_safetensors(path)
    with open(path, 'rb'):
        pass  # so that what goes wrong from here on is due to its content
    if not _LOADS_SAFELY:
        warnings.warn(
            f'torch {torch.__version__} runs code that {path} may hold; from 2.6 on '
            'it does not. Load only files that you trust, or use safetensors',
            stacklevel=2,
        )
    try:
        return torch.load(path, map_location='cpu', weights_only=_LOADS_SAFELY)
    except Exception as error:  # bytes of a file may make a reader raise anything
        raise ValueError(f'{path} {_reason(error)}') from error


def _reason(error: Exception) -> str:
    """What is wrong with a file, as far as the exception says so."""
    words = str(error).split()
    if 'GLOBAL' in words[:-1]:
        name = words[words.index('GLOBAL') + 1][:99]
        return f'holds {name}, which could run code and is not allowed'
    if isinstance(error, UnpicklingError):
        return 'is no checkpoint, is damaged, or holds what could run code'
    return 'is no checkpoint or is damaged'


class SavedDtype:
    """Stand-in for ``numpy.dtype``: the type of plain numbers.

    Args:
        code (str): Kind and size in bytes, such as ``'f8'``.
        align (bool): As numpy writes it; has no meaning for numbers.
        copy (bool): As numpy writes it; has no meaning here.

    Attributes:
        dtype (numpy.dtype): The type.

    Raises:
        UnpicklingError: If the type is of anything but numbers.
    """

    def __new__(cls, code: str, align: bool = False, copy: bool = True) -> 'SavedDtype':
        if not isinstance(code, str) or code not in _TYPE_CODES:
            raise UnpicklingError(
                f'a numpy type {code!r:.99} is not allowed in a checkpoint'
            )
        self = super().__new__(cls)
        self.dtype = np.dtype(code)
        return self

    def __setstate__(self, state: tuple) -> None:
        # Version, byte order, nothing that only other types have, no flags
        if state not in [(3, order, None, None, None, -1, -1, 0) for order in '<>|']:
            raise UnpicklingError('a numpy type in the checkpoint is damaged')
        self.dtype = self.dtype.newbyteorder(state[1])


def _dtype(saved: Any) -> np.dtype:
    if isinstance(saved, np.dtype):  # where a script has allowed numpy's own
        return SavedDtype(saved.str[1:]).dtype.newbyteorder(saved.str[0])
    if not isinstance(saved, SavedDtype):
        raise UnpicklingError('numbers in the checkpoint have no numpy type')
    return saved.dtype


def _numbers(saved_dtype: Any, raw: Any) -> np.ndarray:
    """Numbers from their bytes, in one dimension."""
    dtype = _dtype(saved_dtype)
    # numpy counts on bools being 0 or 1, as when it allots memory for a mask.
    if type(raw) is not bytes or (dtype.kind == 'b' and raw.strip(b'\0\1')):
        raise UnpicklingError('numbers in the checkpoint are damaged')
    return np.frombuffer(raw, dtype)


class SavedArray(np.ndarray):
    """Stand-in for ``numpy.ndarray``: an array of plain numbers.

    It is an ``ndarray``, and is saved as one.
    """

    _filled = False

    def __new__(cls, *args, **kwargs):
        raise UnpicklingError('an array in the checkpoint is damaged')

    def __setstate__(self, state: tuple) -> None:
        # Once only: it lets go of memory that a tensor may have come to share.
        if self._filled or self.size or not isinstance(state, tuple):
            raise UnpicklingError('an array in the checkpoint is damaged')
        self._filled = True
        try:
            _, shape, dtype, is_fortran, raw = state
            numbers = _numbers(dtype, raw)
            numbers = numbers.reshape(shape, order='F' if is_fortran is True else 'C')
        except (TypeError, ValueError) as error:
            raise UnpicklingError('an array in the checkpoint is damaged') from error
        # A state that numpy itself has written
        super().__setstate__(numbers.__reduce__()[2])

    def __reduce_ex__(self, protocol: int) -> tuple:
        return np.asarray(self).__reduce_ex__(protocol)


def _reconstruct(subtype: type, shape: tuple, code: Any) -> SavedArray:
    """Stand-in for ``numpy.core.multiarray._reconstruct``: an empty array."""
    # On memory that nobody frees, until its numbers come with __setstate__
    return np.ndarray.__new__(SavedArray, 0, np.uint8, b'')


def _scalar(dtype: SavedDtype, raw: bytes) -> np.generic:
    """Stand-in for ``numpy.core.multiarray.scalar``: a number."""
    try:
        (number,) = _numbers(dtype, raw)
    except (TypeError, ValueError) as error:
        raise UnpicklingError('a number in the checkpoint is damaged') from error
    return number


def _no_bytes() -> bytes:
    """Stand-in for ``bytes``, which Python calls for those of an empty array."""
    return b''


class SavedHistory(HistoryBuffer):
    """Stand-in for mmengine's ``HistoryBuffer``, which it turns into.

    The names of statistics in the file are not used: mmengine would set them
    for all histories of the process.
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
    """Stand-in for ``getattr`` in checkpoints: statistics of a log history.

    mmengine pickles the methods of :class:`HistoryBuffer` by ``getattr``. The
    real one would hand a malicious file any attribute of anything.
    """
    if owner in (HistoryBuffer, SavedHistory) and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise UnpicklingError(
        f'getattr({owner!r:.99}, {name!r:.99}) is not allowed in a checkpoint'
    )


class SavedArguments(Namespace):
    """Stand-in for ``argparse.Namespace``, which it turns into.

    Training scripts keep their arguments in a checkpoint, DeiT's under ``args``.
    """

    def __init__(self, *args, **kwargs) -> None:
        raise UnpicklingError('the arguments of a script are damaged')

    def __setstate__(self, state: dict) -> None:
        # Names that Python itself gives a meaning to are of no argument
        if type(state) is not dict or not all(
            type(name) is str and not name.startswith('__') for name in state
        ):
            raise UnpicklingError('the arguments of a script are damaged')
        self.__class__ = Namespace
        vars(self).update(state)


def allow_checkpoint_classes() -> None:
    """Let ``torch.load`` read the checkpoints that mmengine and DeiT write.

    The stand-ins of this module are allowed by the names of what they stand
    for. None runs code of the file's choosing. Does nothing before torch 2.6,
    which loads everything.
    """
    if not _LOADS_SAFELY:
        return
    # Their own names too: they stay allowed where a script allows the real
    # ones, which take the place of these or not, as it happens.
    standins = [SavedArguments, SavedArray, SavedDtype, SavedHistory]
    names = [
        (SavedArguments, 'argparse.Namespace'),
        (SavedArray, 'numpy.ndarray'),
        (SavedDtype, 'numpy.dtype'),
        (SavedHistory, f'{HistoryBuffer.__module__}.HistoryBuffer'),
        (_statistic, 'builtins.getattr'),
        (_no_bytes, 'builtins.bytes'),
    ]
    # numpy 1 and 2 name their functions differently, also in files
    for core in ('core', '_core'):
        names.append((_reconstruct, f'numpy.{core}.multiarray._reconstruct'))
        names.append((_scalar, f'numpy.{core}.multiarray.scalar'))
    torch.serialization.add_safe_globals([*standins, *names])
