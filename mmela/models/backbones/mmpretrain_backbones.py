from typing import Any, List, Tuple

from mmpretrain.models.backbones import (
    EfficientNet,
    RegNet,
    Res2Net,
    ResNet,
    ResNetV1d,
    ResNeXt,
    SEResNet,
    SEResNeXt,
    VisionTransformer,
)
from mmpretrain.registry import MODELS
from torch import nn

from ...layers import HookedAttentionStage, TokenAttentionStage
from ...layers.stages import current_pass
from .. import heads  # noqa: F401  (registration)
from .ceit import CeiT
from .mixin import TOKEN_DEFAULTS, HookedLayerAttentionMixin, LayerAttentionMixin
from .resnet_cifar import (  # noqa: F401  registers them
    BottleneckResNet_CIFAR,
    ELABottleneckResNet_CIFAR,
    ELAResNet_CIFAR,
)


@MODELS.register_module()
class ELAResNet(LayerAttentionMixin, ResNet):
    """MMPretrain's ResNet with a layer attention after each residual block.

    Args:
        depth (int): Depth of the ResNet: 18, 34, 50, 101 or 152.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Defaults to
            ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmpretrain.models.ResNet`` and of
            :class:`.LayerAttentionMixin`.

    Example:
        >>> import torch
        >>> from mmpretrain.registry import MODELS
        >>> import mmela
        >>> backbone = MODELS.build(dict(type='ELAResNet', depth=50))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 64))]
        [(1, 2048, 2, 2)]
    """


@MODELS.register_module()
class ELAResNetV1d(LayerAttentionMixin, ResNetV1d):
    """MMPretrain's ResNetV1d (deep stem, average pooling in the downsample)
    with a layer attention after each residual block; arguments as
    :class:`ELAResNet`."""


@MODELS.register_module()
class ELAResNeXt(LayerAttentionMixin, ResNeXt):
    """MMPretrain's ResNeXt with a layer attention after each residual block;
    arguments as :class:`ELAResNet`, and those of
    ``mmpretrain.models.ResNeXt``."""


@MODELS.register_module()
class ELASEResNet(LayerAttentionMixin, SEResNet):
    """MMPretrain's SE-ResNet with a layer attention after each residual block;
    arguments as :class:`ELAResNet`, and those of
    ``mmpretrain.models.SEResNet``."""


@MODELS.register_module()
class ELASEResNeXt(LayerAttentionMixin, SEResNeXt):
    """MMPretrain's SE-ResNeXt with a layer attention after each residual
    block; arguments as :class:`ELAResNet`, and those of
    ``mmpretrain.models.SEResNeXt``."""


@MODELS.register_module()
class ELARes2Net(LayerAttentionMixin, Res2Net):
    """MMPretrain's Res2Net with a layer attention after each residual block;
    arguments as :class:`ELAResNet`, and those of
    ``mmpretrain.models.Res2Net``."""


@MODELS.register_module()
class ELARegNet(LayerAttentionMixin, RegNet):
    """MMPretrain's RegNet with a layer attention after each residual block.

    Args:
        arch (str | dict): Architecture, e.g. ``'regnetx_3.2gf'``.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Its ``head_dim`` must divide the
            width of each stage: 8 does for all named architectures. Defaults
            to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmpretrain.models.RegNet`` and of
            :class:`.LayerAttentionMixin`.
    """


@MODELS.register_module()
class ELAEfficientNet(HookedLayerAttentionMixin, EfficientNet):
    """MMPretrain's EfficientNet with a layer attention after each block that
    has a residual connection (MRLA, section 5.1).

    Consecutive such blocks of one width form a stage. The attention has the
    probability of stochastic depth of its block.

    Args:
        arch (str): Architecture, e.g. ``'b0'`` or ``'b1'``.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`; the papers have ``head_dim=8``
            here. ``KCLA`` needs ``cross_stage=False``, as its heads cannot
            share out the channels of the stage before. Defaults to
            ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmpretrain.models.EfficientNet``
            and of :class:`.HookedLayerAttentionMixin`.
    """

    def attention_stages(self):
        defaults = dict(norm_cfg=self._attention_norm_cfg())
        groups: List[Tuple[List[nn.Module], int, int]] = []
        blocks, stride = [], 1
        for layer in list(self.layers)[1:-1]:
            for block in layer:
                if not _is_residual(block):
                    # Another width or resolution from here on
                    blocks, stride = [], stride * _stride(block)
                    continue
                if not blocks:
                    groups.append((blocks, _width(block), stride))
                    stride = 1
                blocks.append(block)
        return [
            (HookedAttentionStage(blocks), channels, stride, defaults)
            for blocks, channels, stride in groups
        ]


@MODELS.register_module()
class ELAVisionTransformer(HookedLayerAttentionMixin, VisionTransformer):
    """MMPretrain's vision transformer, such as DeiT, with layer attention.

    The layers are partitioned into stages of four (MRLA, appendix B.1). The
    value has a GELU (MRLA, algorithm 4; algorithm 2, of MRLA-base, has none:
    ``value_act_cfg=None``), and nothing is normalized after the attention.

    Args:
        arch (str | dict): Architecture, e.g. ``'deit-tiny'``.
        layers_per_stage (int): Layers of a stage. Defaults to 4.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`; the papers have ``head_dim=16``
            here. Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of
            ``mmpretrain.models.VisionTransformer`` and of
            :class:`.HookedLayerAttentionMixin`.

    Raises:
        ValueError: If ``layers_per_stage`` is less than 1, or as
            :class:`.HookedLayerAttentionMixin` does.
    """

    def __init__(self, *args, layers_per_stage: int = 4, **kwargs) -> None:
        if layers_per_stage < 1:
            raise ValueError(f'layers_per_stage={layers_per_stage} is less than 1')
        self.layers_per_stage = layers_per_stage
        super().__init__(*args, **kwargs)

    def attention_stages(self):
        resolution = _PatchResolution(self.patch_embed)
        extra = self.num_extra_tokens if self.with_cls_token else 0
        layers, size = list(self.layers), self.layers_per_stage
        return [
            (
                TokenAttentionStage(layers[i : i + size], resolution, extra),
                self.embed_dims,
                1,
                TOKEN_DEFAULTS,
            )
            for i in range(0, len(layers), size)
        ]


@MODELS.register_module()
class ELACeiT(ELAVisionTransformer, CeiT):
    """CeiT with layer attention.

    The layers are partitioned into stages of four, and the attention is that
    of :class:`ELAVisionTransformer` (MRLA, appendix B.1). The class tokens
    that are attended over at the end are those after the layer attention.

    Args:
        arch (str | dict): Architecture, ``'tiny'`` or ``'small'``.
        layers_per_stage (int): Layers of a stage. Defaults to 4.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`; the papers have ``head_dim=16``
            here. Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of :class:`.CeiT` and of
            :class:`.HookedLayerAttentionMixin`.

    Raises:
        ValueError: As :class:`.CeiT` and :class:`ELAVisionTransformer` do.
    """


class _PatchResolution:
    """Height and width of the map of patches, as the patch embedding gives them."""

    def __init__(self, patch_embed: nn.Module) -> None:
        patch_embed.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: tuple, output: tuple) -> None:
        current_pass()[self] = output[1]

    def __call__(self, args: tuple, output: Any) -> Tuple[int, int]:
        return current_pass()[self]


def _is_residual(block: nn.Module) -> bool:
    """Whether a block of EfficientNet adds its input to its output."""
    if hasattr(block, 'with_res_shortcut'):  # InvertedResidual
        return block.with_res_shortcut
    return block.with_residual  # EdgeResidual


def _last_conv(block: nn.Module) -> nn.Conv2d:
    return [m for m in block.modules() if isinstance(m, nn.Conv2d)][-1]


def _width(block: nn.Module) -> int:
    """Channels of a block's output."""
    return _last_conv(block).out_channels


def _stride(block: nn.Module) -> int:
    """Stride of a block."""
    stride = 1
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            stride *= module.stride[0]
    return stride
