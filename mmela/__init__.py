"""Efficient layer attention for OpenMMLab toolboxes."""

from importlib import import_module

from .compat.forks import keep_loading_safe, warn_of_mixtures
from .utils.compat import allow_checkpoint_classes, check_versions
from .version import __version__

check_versions()
warn_of_mixtures()

from .registry import register  # noqa: E402

allow_checkpoint_classes()
keep_loading_safe()
register()

__all__ = ['__version__']

_SUBMODULES = ('analysis', 'hooks', 'layers', 'models', 'ops', 'pruning')


def __getattr__(name: str):
    # Not before: together they take a second.
    if name in _SUBMODULES:
        return import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
