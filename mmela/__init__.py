"""Efficient layer attention for OpenMMLab toolboxes."""

from importlib import import_module

from .compat.checkpoints import allow_checkpoint_classes
from .compat.versions import check_versions
from .version import __version__

check_versions()

from .registry import register  # noqa: E402

allow_checkpoint_classes()
register()

__all__ = ['__version__']

_SUBMODULES = ('analysis', 'hooks', 'layers', 'models', 'ops', 'pruning')


def __getattr__(name: str):
    # Not before: together they take a second.
    if name in _SUBMODULES:
        return import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
