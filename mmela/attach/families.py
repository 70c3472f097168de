"""The blocks of known backbones, without a forward pass.

One row per family. A subclass belongs to the family of its base class.
"""

from typing import Any, Callable, Dict, List, Optional

from torch import nn

from ..layers.features import Features, Resolution
from .blocks import Block

Stages = List[List[Block]]
LAYERS_PER_STAGE = 4
"""int: Layers per stage in a transformer that has no stages (MRLA, B.1)."""


def known_stages(network: nn.Module, layers_per_stage: int) -> Optional[Stages]:
    """Look up the stages of a network of a known family.

    Args:
        network (nn.Module): The network.
        layers_per_stage (int): Layers per stage in a transformer without stages.

    Returns:
        list[list[Block]] | None: The stages; None for an unknown family.
    """
    for cls in type(network).__mro__:
        family = FAMILIES.get(f'{cls.__module__}.{cls.__qualname__}')
        if family is not None:
            return family(network, layers_per_stage)
    return None


def is_resnet(network: nn.Module) -> bool:
    """Whether a network is a ResNet of a toolbox, of timm or of torchvision.

    In ResNets, only the config sets the stochastic depth of attentions (MRLA,
    section 5.1; the authors' code applies one constant rate to the attention alone).

    Args:
        network (nn.Module): The network.

    Returns:
        bool: True for these classes and their subclasses.
    """
    names = {f'{c.__module__}.{c.__qualname__}' for c in type(network).__mro__}
    return not names.isdisjoint({*RESNETS, *OTHER_RESNETS})


def _resnet(network: Any, layers_per_stage: int) -> Stages:
    stages: Stages = []
    for name in network.res_layers:
        blocks = []
        for index, module in enumerate(getattr(network, name)):
            last = getattr(module, 'conv3', None) or module.conv2
            shortcut = getattr(module, 'downsample', None)
            blocks.append(
                Block(
                    f'{name}.{index}',
                    module,
                    last.out_channels,
                    stride=module.stride,
                    same_input=shortcut is None,
                    shortcut=None if shortcut is None else 'downsample',
                    own_drop_path=True,
                )
            )
        stages.append(blocks)
    return stages


def _efficientnet(network: Any, layers_per_stage: int) -> Stages:
    """Consecutive blocks with a residual connection (MRLA, section 5.1)."""
    stages: Stages = []
    opened, stride = False, 1
    for number, layer in list(enumerate(network.layers))[1:-1]:
        for index, module in enumerate(layer):
            residual = getattr(module, 'with_res_shortcut', None)
            if not (module.with_residual if residual is None else residual):
                # The width or resolution changes here.
                opened, stride = False, stride * _stride(module)
                continue
            if not opened:
                stages.append([])
            width = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
            stages[-1].append(
                Block(
                    f'layers.{number}.{index}',
                    module,
                    width[-1].out_channels,
                    stride=1 if opened else stride,
                )
            )
            opened, stride = True, 1
    return stages


def _stride(module: nn.Module) -> int:
    stride = 1
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            stride *= part.stride[0]
    return stride


def _vision_transformer(network: Any, layers_per_stage: int) -> Stages:
    # The patch embedding returns the tokens and the size of their map.
    resolution = Resolution('module')
    extra = network.num_extra_tokens if network.with_cls_token else 0
    features = Features('BLC', extra=extra, resolution=resolution)
    blocks = [
        Block(
            f'layers.{i}',
            module,
            network.embed_dims,
            features,
            tells_size=network.patch_embed,
        )
        for i, module in enumerate(network.layers)
    ]
    return [
        blocks[i : i + layers_per_stage]
        for i in range(0, len(blocks), layers_per_stage)
    ]


def _pyramid_vision_transformer(network: Any, layers_per_stage: int) -> Stages:
    # Layers take the tokens and the size of their map.
    features = Features('BLC', resolution=Resolution('arguments'))
    return [
        [
            Block(
                f'layers.{number}.1.{index}',
                module,
                network.embed_dims * heads,
                features,
                stride=1 if index else stride,
            )
            for index, module in enumerate(layers)
        ]
        for number, ((_, layers, _), heads, stride) in enumerate(
            zip(network.layers, network.num_heads, network.strides)
        )
    ]


RESNETS = tuple(
    f'{toolbox}.models.backbones.resnet.ResNet'
    for toolbox in ('mmdet', 'mmpretrain', 'mmseg')
)

OTHER_RESNETS = ('timm.models.resnet.ResNet', 'torchvision.models.resnet.ResNet')

FAMILIES: Dict[str, Callable[[Any, int], Stages]] = {
    **dict.fromkeys(RESNETS, _resnet),
    'mmpretrain.models.backbones.efficientnet.EfficientNet': _efficientnet,
    'mmpretrain.models.backbones.vision_transformer.VisionTransformer': (
        _vision_transformer
    ),
    'mmdet.models.backbones.pvt.PyramidVisionTransformerV2': (
        _pyramid_vision_transformer
    ),
}
"""dict: Families by the full name of their class."""
