from typing import Tuple

from mmdet.models.backbones import (
    PyramidVisionTransformerV2,
    RegNet,
    Res2Net,
    ResNet,
    ResNetV1d,
    ResNeXt,
)
from mmdet.registry import MODELS
from torch import Tensor

from .mixin import LayerAttentionMixin


@MODELS.register_module()
class ELAResNet(LayerAttentionMixin, ResNet):
    """MMDetection's ResNet with a layer attention after each residual block.

    Args:
        depth (int): Depth of the ResNet: 18, 34, 50, 101 or 152.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Defaults to
            ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmdet.models.ResNet`` and of
            :class:`.LayerAttentionMixin`.

    Example:
        >>> import torch
        >>> from mmdet.registry import MODELS
        >>> import mmela
        >>> backbone = MODELS.build(dict(type='ELAResNet', depth=50))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 512, 8, 8), (1, 1024, 4, 4), (1, 2048, 2, 2)]
    """


@MODELS.register_module()
class ELAResNetV1d(LayerAttentionMixin, ResNetV1d):
    """MMDetection's ResNetV1d with a layer attention after each residual block.

    It has a deep stem, and average pooling in the downsample. It takes the arguments
    of :class:`ELAResNet`.
    """


@MODELS.register_module()
class ELAResNeXt(LayerAttentionMixin, ResNeXt):
    """MMDetection's ResNeXt with a layer attention after each residual block.

    It takes the arguments of :class:`ELAResNet` and of ``mmdet.models.ResNeXt``.
    """


@MODELS.register_module()
class ELARes2Net(LayerAttentionMixin, Res2Net):
    """MMDetection's Res2Net with a layer attention after each residual block.

    It takes the arguments of :class:`ELAResNet` and of ``mmdet.models.Res2Net``.
    """


@MODELS.register_module()
class ELARegNet(LayerAttentionMixin, RegNet):
    """MMDetection's RegNet with a layer attention after each residual block.

    Args:
        arch (str | dict): Architecture, e.g. ``'regnetx_3.2gf'``.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Its ``head_dim`` must divide the width of
            every stage; 8 works for all named architectures. Without it, each stage
            uses its largest divisor up to 32. Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmdet.models.RegNet`` and of
            :class:`.LayerAttentionMixin`.
    """


@MODELS.register_module()
class ELAPyramidVisionTransformerV2(LayerAttentionMixin, PyramidVisionTransformerV2):
    """MMDetection's PVTv2 with a layer attention after each layer.

    The value has a GELU as in MRLA's algorithm 4 (algorithm 2, of MRLA-base, has
    none: set ``value_act_cfg=None``). There is no normalization after the attention.
    For classification with MMPretrain, use
    ``type='mmdet.ELAPyramidVisionTransformerV2'``.

    Args:
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`; the papers use ``head_dim=16`` here.
            Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of
            ``mmdet.models.PyramidVisionTransformerV2`` and of
            :class:`.LayerAttentionMixin`.
    """

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Map images, (B, 3, H, W), to one map per stage in ``out_indices``."""
        # MMPretrain's heads need a tuple
        return tuple(super().forward(x))
