"""Efficient layer attention for OpenMMLab toolboxes."""

from importlib import import_module

from .utils.compat import allow_checkpoint_classes, check_versions
from .version import __version__

check_versions()

from .compat.operators import provide_operators  # noqa: E402
from .registry import register  # noqa: E402

provide_operators()
allow_checkpoint_classes()
register()

__all__ = ['__version__']

_SUBMODULES = ('analysis', 'hooks', 'layers', 'models', 'ops', 'pruning')


def __getattr__(name: str):
    # Not before: together they take a second.
    if name in _SUBMODULES:
        return import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
