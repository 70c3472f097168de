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
            width of each stage, as 8 does for all named architectures; not given,
            it is the largest that does. Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmpretrain.models.RegNet`` and of
            :class:`.LayerAttentionMixin`.
    """


@MODELS.register_module()
class ELAEfficientNet(LayerAttentionMixin, EfficientNet):
    """MMPretrain's EfficientNet with a layer attention after each block that
    has a residual connection (MRLA, section 5.1).

    Consecutive such blocks of one width form a stage. The attention has the
    probability of stochastic depth of its block.

    Args:
        arch (str): Architecture, e.g. ``'b0'`` or ``'b1'``.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`; the papers have ``head_dim=8``
            here. With ``KCLA`` nothing crosses the stages, as its heads cannot
            share out the channels of the stage before. Defaults to
            ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmpretrain.models.EfficientNet``
            and of :class:`.LayerAttentionMixin`.
    """


@MODELS.register_module()
class ELAVisionTransformer(LayerAttentionMixin, VisionTransformer):
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
            :class:`.LayerAttentionMixin`.

    Raises:
        ValueError: If ``layers_per_stage`` is less than 1, or as
            :class:`.LayerAttentionMixin` does.
    """


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
            :class:`.LayerAttentionMixin`.

    Raises:
        ValueError: As :class:`.CeiT` and :class:`ELAVisionTransformer` do.
    """
