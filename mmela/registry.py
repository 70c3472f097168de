"""Registration of mmela's modules, none of which is imported for it.

``import mmela`` goes beside ``import mmdet`` in every process of a training,
so it must cost next to nothing. Models of mmengine and of the toolboxes take
seconds to import, and are when a registry is first asked for one.
"""

import sys
from importlib import import_module
from typing import Any

from mmengine.registry import HOOKS, MODELS, Registry

TOOLBOXES = ('mmdet', 'mmpretrain', 'mmseg')
LAYERS = ('KCLA', 'MLA', 'MRLABase', 'MRLALight')


def register() -> None:
    """Register the layer attentions, the hook and the backbones."""
    for name in LAYERS:
        _register_lazily(MODELS, name, 'mmela.layers')
    _register_lazily(HOOKS, 'LayerAttentionPruningHook', 'mmela.hooks')
    for toolbox in TOOLBOXES:
        # A toolbox's registry announces itself to the root registry.
        if toolbox in MODELS.children:
            add_backbones(MODELS.children[toolbox])
    _announce_to(MODELS)


def add_backbones(registry: Registry) -> None:
    """Have a toolbox register the backbones for its scope.

    They inherit from the toolbox's models, and so join their import.

    Args:
        registry (Registry): ``MODELS`` of the toolbox.
    """
    location = f'mmela.models.backbones.{registry.scope}_backbones'
    if registry._imported:
        import_module(location)
    elif location not in registry._locations:
        registry._locations.append(location)


class Placeholder:
    """Stands for a class in a registry until the class is asked for.

    Args:
        name (str): Name of the class.
        module (str): Module that has it, and registers it when imported.
    """

    def __init__(self, name: str, module: str) -> None:
        self.__name__ = name
        self.__module__ = module

    def load(self) -> type:
        """Import the class, which takes the place of this."""
        return getattr(import_module(self.__module__), self.__name__)

    def __call__(self, *args, **kwargs) -> Any:
        return self.load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.load(), name)


def _register_lazily(registry: Registry, name: str, module: str) -> None:
    if module in sys.modules:
        return  # the class itself is registered
    registry.register_module(name=name, module=Placeholder(name, module), force=True)


def _announce_to(root: Registry) -> None:
    """Add the backbones to the registries of toolboxes imported later."""
    add_child = root._add_child

    def announce(registry: Registry) -> None:
        add_child(registry)
        if registry.scope in TOOLBOXES:
            add_backbones(registry)

    root._add_child = announce
