"""Write the operators into mmcv's folder, so that every process has them.

See :mod:`mmela.compat.mmcv_ext` for the operators, and
:mod:`mmela_light.operators` for how processes find them otherwise.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from ..files import replacing

_SOURCE = Path(__file__).with_name('mmcv_ext.py')


def write_operators() -> Path:
    """Write the operators into mmcv's folder, for processes without mmela.

    Tools that import ``mmcv.ops`` before they read a config find them there, and so do
    data loader workers that are new processes (Windows, macOS). Python prefers compiled
    operators in the same folder.

    Returns:
        Path: The written file.

    Raises:
        FileExistsError: If mmcv has compiled operators.
        ModuleNotFoundError: If mmcv is not installed.
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
        Path: The removed file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If mmcv is not installed.
    """
    path = _operator_file()
    path.unlink()
    return path


def _operator_file() -> Path:
    spec = find_spec('mmcv')
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError('mmcv is not installed: pip install mmcv-lite')
    return Path(spec.origin).with_name('_ext.py')
