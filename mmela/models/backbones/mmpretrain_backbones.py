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

from .. import heads  # noqa: F401  (registration)
from .ceit import CeiT
from .mixin import LayerAttentionMixin
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
    """MMPretrain's ResNetV1d with a layer attention after each residual block.

    It has a deep stem, and average pooling in the downsample. It takes the arguments
    of :class:`ELAResNet`.
    """


@MODELS.register_module()
class ELAResNeXt(LayerAttentionMixin, ResNeXt):
    """MMPretrain's ResNeXt with a layer attention after each residual block.

    It takes the arguments of :class:`ELAResNet` and of
    ``mmpretrain.models.ResNeXt``.
    """


@MODELS.register_module()
class ELASEResNet(LayerAttentionMixin, SEResNet):
    """MMPretrain's SE-ResNet with a layer attention after each residual block.

    It takes the arguments of :class:`ELAResNet` and of
    ``mmpretrain.models.SEResNet``.
    """


@MODELS.register_module()
class ELASEResNeXt(LayerAttentionMixin, SEResNeXt):
    """MMPretrain's SE-ResNeXt with a layer attention after each residual block.

    It takes the arguments of :class:`ELAResNet` and of
    ``mmpretrain.models.SEResNeXt``.
    """


@MODELS.register_module()
class ELARes2Net(LayerAttentionMixin, Res2Net):
    """MMPretrain's Res2Net with a layer attention after each residual block.

    It takes the arguments of :class:`ELAResNet` and of
    ``mmpretrain.models.Res2Net``.
    """


@MODELS.register_module()
class ELARegNet(LayerAttentionMixin, RegNet):
    """MMPretrain's RegNet with a layer attention after each residual block.

    Args:
        arch (str | dict): Architecture, e.g. ``'regnetx_3.2gf'``.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Its ``head_dim`` must divide the width of
            every stage; 8 works for all named architectures. Without it, each stage
            uses its largest divisor up to 32. Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmpretrain.models.RegNet`` and of
            :class:`.LayerAttentionMixin`.
    """


@MODELS.register_module()
class ELAEfficientNet(LayerAttentionMixin, EfficientNet):
    """MMPretrain's EfficientNet with a layer attention after each residual block.

    Only blocks with a residual connection get one (MRLA, section 5.1). Consecutive
    such blocks of one width form a stage. The attention has the stochastic depth rate
    of its block.

    Args:
        arch (str): Architecture, e.g. ``'b0'`` or ``'b1'``.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`; the papers use ``head_dim=8`` here. With
            ``KCLA`` each stage starts without the memory of the previous one, because
            its heads do not divide the channels of the previous stage. Defaults to
            ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmpretrain.models.EfficientNet``
            and of :class:`.LayerAttentionMixin`.
    """


@MODELS.register_module()
class ELAVisionTransformer(LayerAttentionMixin, VisionTransformer):
    """MMPretrain's vision transformer, such as DeiT, with layer attention.

    Four layers form a stage (MRLA, appendix B.1). The value has a GELU as in MRLA's
    algorithm 4 (algorithm 2, of MRLA-base, has none: set ``value_act_cfg=None``).
    There is no normalization after the attention.

    Args:
        arch (str | dict): Architecture, e.g. ``'deit-tiny'``.
        layers_per_stage (int): Layers per stage. Defaults to 4.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`; the papers use ``head_dim=16`` here.
            Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of
            ``mmpretrain.models.VisionTransformer`` and of
            :class:`.LayerAttentionMixin`.

    Raises:
        ValueError: If ``layers_per_stage`` is less than 1, and as in
            :class:`.LayerAttentionMixin`.
    """


@MODELS.register_module()
class ELACeiT(ELAVisionTransformer, CeiT):
    """CeiT with layer attention.

    Stages and attention are those of :class:`ELAVisionTransformer` (MRLA, appendix
    B.1). CeiT's final attention over class tokens sees them after the layer attention.

    Args:
        arch (str | dict): Architecture, ``'tiny'`` or ``'small'``.
        layers_per_stage (int): Layers per stage. Defaults to 4.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`; the papers use ``head_dim=16`` here.
            Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of :class:`.CeiT` and of
            :class:`.LayerAttentionMixin`.

    Raises:
        ValueError: As in :class:`.CeiT` and :class:`ELAVisionTransformer`.
    """
