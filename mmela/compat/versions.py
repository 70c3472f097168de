import runpy
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Optional, Tuple

from ..version import SUPPORTED

# Required packages, and how to install them
_REQUIRED = {
    'torch': 'pip install torch torchvision',
    'mmengine': 'pip install "mmela[mmdet]", or mmela[mmpretrain] or mmela[mmseg]',
    'mmcv': 'pip install mmcv-lite',
}


def check_versions(supported: Optional[Dict[str, Tuple[str, str]]] = None) -> None:
    """Check the versions of the packages that mmela works with.

    Packages are found by import name, whichever distribution provides them. Optional
    packages that are not installed are skipped.

    Args:
        supported (dict[str, tuple[str, str]], optional): First supported and
            first unsupported version of each package. Defaults to
            ``mmela.version.SUPPORTED``.

    Raises:
        ImportError: If a package is missing or its version is not supported.
    """
    supported = supported or SUPPORTED
    for name, command in _REQUIRED.items():
        if name in supported and not is_installed(name):
            first, last = supported[name]
            raise ImportError(
                f'mmela needs {name} >= {first}, < {last}, which is not installed; '
                f'install it with: {command}'
            )
    from mmengine.utils import digit_version  # mmengine is installed, as checked above

    for name, (first, last) in supported.items():
        if not is_installed(name):
            continue
        version = find_version(name)
        if not digit_version(first) <= digit_version(version) < digit_version(last):
            raise ImportError(
                f'mmela needs {name} >= {first}, < {last}, but {name} {version} is '
                'installed; install a supported version'
            )


def is_installed(name: str) -> bool:
    """Whether a package can be imported.

    Args:
        name (str): Import name.

    Returns:
        bool: False also for a plain folder of that name on the path, such as a clone
        of a toolbox's repository, which Python treats as an empty package.
    """
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def find_version(name: str) -> str:
    """Find the version of an installed package.

    It comes from the package's ``version.py``, which all OpenMMLab packages have, so
    that the toolbox need not be imported.

    Args:
        name (str): Import name.

    Returns:
        str: The version.
    """
    if name not in sys.modules:
        path = Path(find_spec(name).origin).with_name('version.py')
        if path.is_file():
            version = runpy.run_path(str(path)).get('__version__')
            if isinstance(version, str):
                return version
    return import_module(name).__version__
