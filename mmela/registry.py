"""Registries of mmela, and how the toolboxes get its backbones."""

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
    """Class of a layer attention.

    Args:
        type (str | type): Its registered name, or the class itself.

    Returns:
        type: The class.

    Raises:
        KeyError: If there is none of that name.
    """
    found = LAYER_ATTENTIONS.get(type) if isinstance(type, str) else type
    if not isclass(found):  # a function, which builds backbones
        classes = LAYER_ATTENTIONS.module_dict.items()
        names = sorted(name for name, kind in classes if isclass(kind))
        raise KeyError(
            f'there is no layer attention {type!r}{did_you_mean(type, names)}; allowed '
            f'are {", ".join(names)}'
        )
    return found


TOOLBOXES = ('mmdet', 'mmpretrain', 'mmseg')


def register_backbones() -> None:
    """Give the backbones to the toolboxes that are imported, or will be.

    ``import mmela`` calls this. A toolbox that is imported later gets them as
    well, as soon as its registry is asked for a model.
    """
    for toolbox in TOOLBOXES:
        # A toolbox's registry announces itself to the root registry.
        if toolbox in MODELS.children:
            _add_backbones(MODELS.children[toolbox])
    if '_add_child' in vars(MODELS):
        return  # announced already

    def add_child(registry: Registry) -> None:
        type(MODELS)._add_child(MODELS, registry)
        if registry.scope in TOOLBOXES:
            _add_backbones(registry)

    MODELS._add_child = add_child


def _add_backbones(registry: Registry) -> None:
    """Have a toolbox's registry import what belongs to its scope."""
    location = f'mmela.models.backbones.{registry.scope}_backbones'
    if registry._imported:
        import_module(location)
    elif location not in registry._locations:
        # They inherit from the toolbox's models, and so join their import.
        registry._locations.append(location)
