from mmseg.models.backbones import ResNet, ResNetV1c
from mmseg.registry import MODELS

from .. import unet  # noqa: F401  (registration)
from .mixin import LayerAttentionMixin


@MODELS.register_module()
class ELAResNet(LayerAttentionMixin, ResNet):
    """MMSegmentation's ResNet with a layer attention after each block.

    Args:
        depth (int): Depth of the ResNet: 18, 34, 50, 101 or 152.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Defaults to
            ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmseg.models.ResNet`` and of
            :class:`.LayerAttentionMixin`.

    Example:
        >>> import torch
        >>> from mmseg.registry import MODELS
        >>> import mmela
        >>> backbone = MODELS.build(dict(type='ELAResNet', depth=50))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 512, 8, 8), (1, 1024, 4, 4), (1, 2048, 2, 2)]
    """


@MODELS.register_module()
class ELAResNetV1c(LayerAttentionMixin, ResNetV1c):
    """:class:`ELAResNet` with a stem of three 3x3 convolutions.

    Most configs of MMSegmentation use ``ResNetV1c``.

    Args:
        **kwargs: Arguments of ``mmseg.models.ResNetV1c`` and of
            :class:`.LayerAttentionMixin`.
    """
