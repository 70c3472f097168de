"""Provide operators for an mmcv without them, see :mod:`mmela.compat.mmcv_ext`.

:func:`provide_operators` is an entry point of ``torch.backends``, which torch 2.5 or
newer calls at the end of ``import torch``. So mmdet's own tools, which import
``mmcv.ops`` without mmela, have operators, too.
"""

import sys
from typing import Any

_EXTENSION = 'mmcv._ext'


class _OperatorFinder:
    """Finds mmcv's extension module if no other finder does.

    So compiled operators are preferred, and nothing is imported until mmcv needs
    operators. mmengine and mmcv also request the module's spec.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _EXTENSION:
            return None
        # Ask later finders first, such as the finder of an editable install
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, 'find_spec', None)  # old finders lack it
            spec = find and find(fullname, path, target)
            if spec:
                return spec
        from importlib.util import spec_from_file_location
        from multiprocessing import current_process
        from pathlib import Path

        # On Windows and macOS, a data worker is a new process and needs operators to
        # unpickle its data set. It unpickles this config first.
        current_process()._config[__name__] = self
        source = Path(__file__).parents[1] / 'mmela' / 'compat' / 'mmcv_ext.py'
        return spec_from_file_location(fullname, source)

    def __reduce__(self) -> tuple:
        return provide_operators, ()


_FINDER = _OperatorFinder()


def provide_operators() -> None:
    """Let ``mmcv.ops`` find operators in this process if mmcv is not compiled."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
