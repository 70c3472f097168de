"""Operators in mmcv's folder, where no process has to find them.

See :mod:`mmela.compat.mmcv_ext` for the operators, and
:mod:`mmela_light.operators` for how processes find them without this.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from ..files import replacing

_SOURCE = Path(__file__).with_name('mmcv_ext.py')


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
