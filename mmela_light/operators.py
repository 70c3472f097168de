"""Finds operators for mmcv where it has none, see :mod:`mmela.compat.mmcv_ext`.

From 2.5 on, torch calls :func:`provide_operators` at the end of ``import torch``, as an
entry point of ``torch.backends``. So mmdet's own tools, which import ``mmcv.ops``
without mmela, have operators.
"""

import sys
from typing import Any

_EXTENSION = 'mmcv._ext'


class _OperatorFinder:
    """Finds mmcv's extension module where no other finder does.

    So compiled operators are preferred, and until mmcv asks for operators
    nothing is imported. mmengine and mmcv also ask for the module's spec.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _EXTENSION:
            return None
        # Those that have been added since, such as that of an editable install
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, 'find_spec', None)  # which old ones lack
            spec = find and find(fullname, path, target)
            if spec:
                return spec
        from importlib.util import spec_from_file_location
        from multiprocessing import current_process
        from pathlib import Path

        # A worker that is a new process (Windows, macOS) needs operators
        # when it unpickles its data set; this it unpickles before.
        current_process()._config[__name__] = self
        source = Path(__file__).parents[1] / 'mmela' / 'compat' / 'mmcv_ext.py'
        return spec_from_file_location(fullname, source)

    def __reduce__(self) -> tuple:
        return provide_operators, ()


_FINDER = _OperatorFinder()


def provide_operators() -> None:
    """Have ``mmcv.ops`` find operators in this process without a compiled mmcv.

    Nothing changes where mmcv is compiled.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
