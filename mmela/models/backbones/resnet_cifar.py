from typing import Sequence

from mmpretrain.models.backbones.resnet import Bottleneck
from mmpretrain.models.backbones.resnet_cifar import ResNet_CIFAR
from mmpretrain.registry import MODELS


@MODELS.register_module()
class BottleneckResNet_CIFAR(ResNet_CIFAR):
    """The ResNet for CIFAR that the layer attention papers start from.

    As the ResNet for CIFAR of He et al. (2016, section 4.2) it has a 3x3 stem
    of 16 channels and three stages of 16, 32 and 64 channels. Its blocks are
    bottlenecks, which widen that to 64, 128 and 256: only so the parameters
    are those of the papers (0.24, 0.61 and 1.17 M at depth 20, 56 and 110 with
    100 classes).

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
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(
                f'depth={depth} is not 9n + 2 for n bottlenecks in each of 3 '
                'stages; allowed are 11, 20, 29, ..., 56, ..., 110, ...'
            )
        # Where the parent looks up what a depth means
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
