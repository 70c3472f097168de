from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS

from .mixin import LayerAttentionMixin


@MODELS.register_module()
class ELAResNet(LayerAttentionMixin, ResNet):
    """MMDetection's ResNet with a layer attention after each residual block.

    Args:
        depth (int): Depth of the ResNet: 18, 34, 50, 101 or 152.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Defaults to
            ``dict(type='MRLABase')``.
        **kwargs: All further arguments of ``mmdet.models.ResNet``.

    Example:
        >>> import torch
        >>> from mmdet.registry import MODELS
        >>> import mmela
        >>> backbone = MODELS.build(dict(type='ELAResNet', depth=50))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 512, 8, 8), (1, 1024, 4, 4), (1, 2048, 2, 2)]
    """
