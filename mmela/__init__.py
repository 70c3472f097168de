"""Efficient layer attention for OpenMMLab toolboxes."""
from .utils.compat import allow_checkpoint_classes, check_versions
from .version import __version__

check_versions()

from . import hooks, layers  # noqa: E402, F401  (registration)
from .registry import register_backbones  # noqa: E402

allow_checkpoint_classes()
register_backbones()

__all__ = ['__version__']
