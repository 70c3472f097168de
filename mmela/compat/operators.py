"""Operators for mmcv where it has none: see :mod:`mmela.compat.mmcv_ext`."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from multiprocessing import current_process
from pathlib import Path
from typing import Optional

from ..files import replacing

_EXTENSION = 'mmcv._ext'
_SOURCE = Path(__file__).with_name('mmcv_ext.py')


class _OperatorFinder(MetaPathFinder):
    """Finds mmcv's extension module where no finder before it does.

    So compiled operators are preferred, and until mmcv asks for operators
    nothing is imported. mmengine and mmcv also ask for the module's spec.
    """

    def find_spec(self, fullname, path=None, target=None) -> Optional[ModuleSpec]:
        if fullname == _EXTENSION:
            # A worker that is a new process (Windows, macOS) needs operators
            # when it unpickles its data set; this it unpickles before.
            current_process()._config[__name__] = provide_operators
            return spec_from_file_location(fullname, _SOURCE)
        return None


_FINDER = _OperatorFinder()


def provide_operators() -> None:
    """Have ``mmcv.ops`` find operators in this process without a compiled mmcv.

    Nothing changes where mmcv is compiled.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def write_operators() -> Path:
    """Put the operators into mmcv's folder, for processes without mmela.

    A tool that imports ``mmcv.ops`` before it reads a config finds them there,
    and so does a worker of a data loader that is a new process (Windows,
    macOS). A compiled mmcv in the same folder is preferred by Python.

    Returns:
        Path: The file that was written.

    Raises:
        FileExistsError: If mmcv is compiled.
        ModuleNotFoundError: If there is no mmcv.
    """
    path = _operator_file()
    for suffix in EXTENSION_SUFFIXES:
        compiled = path.with_name('_ext' + suffix)
        if compiled.exists():
            raise FileExistsError(f'mmcv has compiled operators: {compiled}')
    with replacing(path) as temporary:
        temporary.write_bytes(_SOURCE.read_bytes())
    return path


def remove_operators() -> Path:
    """Undo :func:`write_operators`.

    Returns:
        Path: The file that is gone.

    Raises:
        FileNotFoundError: If it was not there.
        ModuleNotFoundError: If there is no mmcv.
    """
    path = _operator_file()
    path.unlink()
    return path


def _operator_file() -> Path:
    spec = find_spec('mmcv')
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError('mmcv is not installed: pip install mmcv-lite')
    return Path(spec.origin).with_name('_ext.py')
