import warnings
from typing import Optional, Sequence

from mmpretrain.models.backbones.resnet import Bottleneck
from mmpretrain.models.backbones.resnet_cifar import ResNet_CIFAR
from mmpretrain.registry import MODELS

from .mixin import LayerAttentionMixin


@MODELS.register_module()
class BottleneckResNet_CIFAR(ResNet_CIFAR):
    """The ResNet for CIFAR that the layer attention papers use.

    Like the ResNet for CIFAR of He et al. (2016, section 4.2), it has a 3x3 stem of 16
    channels and three stages of 16, 32 and 64 channels. Its blocks are bottlenecks,
    which widen the stages to 64, 128 and 256 channels; this gives the numbers of
    parameters in the papers (0.24, 0.61 and 1.17 M at depth 20, 56 and 110 with 100
    classes).

    Args:
        depth (int): 9n + 2 for n blocks per stage, e.g. 20, 56 or 110.
        stem_channels (int): Channels of the stem. Defaults to 16.
        base_channels (int): Inner channels of the first stage. Defaults to 16.
        num_stages (int): Number of stages. Defaults to 3.
        strides (Sequence[int]): Stride of each stage. Defaults to (1, 2, 2).
        dilations (Sequence[int]): Dilation of each stage. Defaults to
            (1, 1, 1).
        out_indices (Sequence[int]): Stages whose output is returned. Defaults
            to (2, ).
        **kwargs: All further arguments of mmpretrain's ``ResNet_CIFAR``.

    Raises:
        ValueError: If ``depth`` is not 9n + 2.

    Example:
        >>> import torch
        >>> from mmpretrain.registry import MODELS
        >>> import mmela
        >>> net = MODELS.build(dict(type='BottleneckResNet_CIFAR', depth=20))
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 32, 32))]
        [(1, 256, 8, 8)]
    """

    def __init__(
        self,
        depth: int,
        stem_channels: int = 16,
        base_channels: int = 16,
        num_stages: int = 3,
        strides: Sequence[int] = (1, 2, 2),
        dilations: Sequence[int] = (1, 1, 1),
        out_indices: Sequence[int] = (2,),
        **kwargs,
    ) -> None:
        if not _is_bottleneck_depth(depth):
            raise ValueError(
                f'depth={depth} is not 9n + 2 for n bottlenecks in each of 3 '
                'stages; allowed are 11, 20, 29, ..., 56, ..., 110, ...'
            )
        # The parent looks up the depth here
        blocks = ((depth - 2) // 9,) * num_stages
        self.arch_settings = {depth: (Bottleneck, blocks)}
        super().__init__(
            depth,
            stem_channels=stem_channels,
            base_channels=base_channels,
            num_stages=num_stages,
            strides=strides,
            dilations=dilations,
            out_indices=out_indices,
            **kwargs,
        )


@MODELS.register_module()
class ELAResNet_CIFAR(LayerAttentionMixin, ResNet_CIFAR):
    """MMPretrain's ResNet for CIFAR with a layer attention after each block.

    Up to version 0.1, :class:`ELABottleneckResNet_CIFAR` had this name. With a depth
    that only that class has, this name still builds it, with a
    ``DeprecationWarning``. Depth 101, which both have, builds MMPretrain's ResNet.

    Args:
        depth (int): Depth of the ResNet: 18, 34, 50, 101 or 152.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Defaults to
            ``dict(type='MRLABase')``.
        **kwargs: All further arguments of mmpretrain's ``ResNet_CIFAR`` and of
            :class:`.LayerAttentionMixin`.

    Example:
        >>> import torch
        >>> from mmpretrain.registry import MODELS
        >>> import mmela
        >>> net = MODELS.build(dict(type='ELAResNet_CIFAR', depth=18))
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 32, 32))]
        [(1, 512, 4, 4)]
    """

    def __new__(cls, depth: Optional[int] = None, *args, **kwargs):
        # copy and pickle call this without arguments
        if cls is ELAResNet_CIFAR and depth not in (None, *cls.arch_settings):
            if _is_bottleneck_depth(depth):
                warnings.warn(
                    f"type='ELAResNet_CIFAR' with depth={depth} is now called "
                    "type='ELABottleneckResNet_CIFAR'",
                    DeprecationWarning,
                    stacklevel=2,
                )
                cls = ELABottleneckResNet_CIFAR
        return super().__new__(cls)


@MODELS.register_module()
class ELABottleneckResNet_CIFAR(ELAResNet_CIFAR, BottleneckResNet_CIFAR):
    """:class:`BottleneckResNet_CIFAR` with a layer attention after each block.

    Args:
        depth (int): 9n + 2 for n blocks per stage, e.g. 20, 56 or 110.
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. Defaults to
            ``dict(type='MRLABase')``; the papers use ``head_dim=16`` here.
        **kwargs: All further arguments of :class:`BottleneckResNet_CIFAR` and
            of :class:`.LayerAttentionMixin`.

    Raises:
        ValueError: If ``depth`` is not 9n + 2.

    Example:
        >>> import torch
        >>> from mmpretrain.registry import MODELS
        >>> import mmela
        >>> net = MODELS.build(dict(type='ELABottleneckResNet_CIFAR', depth=20))
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 32, 32))]
        [(1, 256, 8, 8)]
    """


def _is_bottleneck_depth(depth: int) -> bool:
    """Whether three stages of bottlenecks, with 3 layers each, can have this depth."""
    return depth >= 11 and (depth - 2) % 9 == 0
