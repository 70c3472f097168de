"""Registration of mmela's modules in the toolboxes' registries."""
from importlib import import_module
from importlib.util import find_spec

TOOLBOXES = ('mmdet', 'mmpretrain', 'mmseg')


def register_backbones() -> None:
    """Have each installed toolbox register the backbones for its scope.

    A toolbox imports its models when its registry is first asked for one, and
    that takes seconds. The backbones, which inherit from those models, join
    that import instead of forcing it when mmela is imported.
    """
    for toolbox in TOOLBOXES:
        if find_spec(toolbox) is None:
            continue
        models = import_module(f'{toolbox}.registry').MODELS
        location = f'mmela.models.backbones.{toolbox}_backbones'
        if models._imported:
            import_module(location)
        elif location not in models._locations:
            models._locations.append(location)
