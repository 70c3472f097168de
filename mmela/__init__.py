"""Efficient layer attention for OpenMMLab toolboxes."""

from .compat.versions import check_versions
from .version import __version__

check_versions()  # before any import that may fail

from mmela_light.operators import provide_operators  # noqa: E402

from .compat.checkpoints import allow_checkpoint_classes  # noqa: E402
from .compat.forks import keep_loading_safe, warn_of_mixtures  # noqa: E402
from .compat.loaders import register_loaders  # noqa: E402

warn_of_mixtures()
provide_operators()
allow_checkpoint_classes()
keep_loading_safe()
register_loaders()

from . import baselines, hooks, layers  # noqa: E402  (registration)
from .attach import attach_layer_attention  # noqa: E402
from .engine import rewrap_after_loading  # noqa: E402
from .registry import LAYER_ATTENTIONS, register_backbones  # noqa: E402

register_backbones()
rewrap_after_loading()

__all__ = [
    'LAYER_ATTENTIONS',
    '__version__',
    'attach_layer_attention',
    'baselines',
    'hooks',
    'layers',
    'register_backbones',
]
