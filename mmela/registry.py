"""Registry of layer attentions, and registration of backbones in the toolboxes."""

from importlib import import_module
from inspect import isclass
from typing import Union

from mmengine.registry import MODELS, Registry

from .arguments import did_you_mean

LAYER_ATTENTIONS = Registry('layer attention', parent=MODELS, scope='mmela')
"""Registry: Layer attentions, a child of mmengine's ``MODELS``:
``dict(type='MRLABase')`` within ``layer_attention``,
``dict(type='mmela.MRLABase')`` anywhere else."""


def find_layer_attention(type: Union[str, type]) -> type:
    """Look up the class of a layer attention.

    Args:
        type (str | type): Its registered name, or the class itself.

    Returns:
        type: The class.

    Raises:
        KeyError: If no class is registered under that name.
    """
    cls = LAYER_ATTENTIONS.get(type) if isinstance(type, str) else type
    if not isclass(cls):  # None, or a function that builds backbones
        classes = LAYER_ATTENTIONS.module_dict.items()
        names = sorted(name for name, kind in classes if isclass(kind))
        raise KeyError(
            f'there is no layer attention {type!r}{did_you_mean(type, names)}; allowed '
            f'are {", ".join(names)}'
        )
    return cls


TOOLBOXES = ('mmdet', 'mmpretrain', 'mmseg')


def register_backbones() -> None:
    """Register the backbones in the toolboxes that are or will be imported.

    ``import mmela`` calls this. A toolbox imported later gets the backbones when its
    registry first looks up a model.
    """
    for toolbox in TOOLBOXES:
        # A toolbox's registry announces itself to the root registry.
        if toolbox in MODELS.children:
            _add_backbones(MODELS.children[toolbox])
    if '_add_child' in vars(MODELS):
        return  # already set up

    def add_child(registry: Registry) -> None:
        type(MODELS)._add_child(MODELS, registry)
        if registry.scope in TOOLBOXES:
            _add_backbones(registry)

    MODELS._add_child = add_child


def _add_backbones(registry: Registry) -> None:
    """Let a toolbox's registry import the backbones of its scope."""
    location = f'mmela.models.backbones.{registry.scope}_backbones'
    if registry._imported:
        import_module(location)
    elif location not in registry._locations:
        # They inherit from the toolbox's models, so they are imported with them.
        registry._locations.append(location)
