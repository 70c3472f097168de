from dataclasses import dataclass
from typing import Optional, Tuple

from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..layers import StageMemory
from ..registry import LAYER_ATTENTIONS
from .branch import BranchAttention, Replacements, Taps, convolutions, pooled


@LAYER_ATTENTIONS.register_module()
class BA(BranchAttention):
    r"""Bridge attention (BA-Net, Zhao et al. 2022, eq. 3 to 6).

    Channels of a block are scaled by the outputs of all its layers, and not only of
    the last one as in SE. :math:`S_i` is the pooled output of layer ``i`` of ``n``:

    .. math::
        w = \sigma\left(W \mathrm{ReLU}\left(\sum_{i \le n}
            \mathrm{BN}_i(W_i S_i)\right)\right), \quad
        Y = X + w \odot F(X)

    Args:
        channels (int): Channels ``C`` of the block's output.
        reduction (int): Reduction factor of the hidden channels. Defaults to 16.
        **kwargs: ``drop_path``, ``norm_cfg`` and ``init_cfg``, see
            :class:`BranchAttention`.

    Raises:
        ValueError: If ``reduction`` leaves no channel, or the block is not from a
            network of the ResNet family.
    """

    @dataclass
    class Memory(StageMemory):
        """Terms of the layers of the running block.

        Attributes:
            bridges (Tensor, optional): Sum of the terms of all layers but the last,
                (B, C / reduction).
        """

        bridges: Optional[Tensor] = None

    def __init__(self, channels: int, reduction: int = 16, **kwargs) -> None:
        super().__init__(channels, **kwargs)
        if not 1 <= reduction <= channels:
            raise ValueError(
                f'reduction={reduction} leaves none of {channels} channels; '
                f'allowed are 1 to {channels}'
            )
        self.reduction = reduction
        self.layers = nn.ModuleDict()
        self._add_layer('last', channels)
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.Linear(channels // reduction, channels, bias=False)

    def _add_layer(self, name: str, channels: int) -> None:
        width = self.channels // self.reduction
        # A norm for vectors, independent of the norm for maps in the backbone
        norm = build_norm_layer(dict(type='BN1d'), width)[1]
        self.layers[name] = nn.Sequential(nn.Linear(channels, width, bias=False), norm)

    def connect(self, block: nn.Module) -> Tuple[Taps, Replacements]:
        taps, replacements = super().connect(block)
        # The input of a convolution is the output of the previous layer
        inner = {n: conv for n, conv in convolutions(block).items() if n != 'conv1'}
        for name, conv in inner.items():
            self._add_layer(name, conv.in_channels)
        return {**{name: f'bridge_{name}' for name in inner}, **taps}, replacements

    def bridge_conv2(self, x: Tensor, output: Tensor, memory: Optional[Memory]) -> None:
        """Add the term of the first layer of the block.

        Args:
            x (Tensor): Input of the layer after it, (B, C_in, H_in, W_in).
            output (Tensor): Its output, (B, C_out, H, W).
            memory (BA.Memory): Memory of the stage.
        """
        self._bridge('conv2', x, memory)

    def bridge_conv3(self, x: Tensor, output: Tensor, memory: Optional[Memory]) -> None:
        """Add the term of the second layer of the block.

        Args:
            x (Tensor): Input of the layer after it, (B, C_in, H_in, W_in).
            output (Tensor): Its output, (B, C_out, H, W).
            memory (BA.Memory): Memory of the stage.
        """
        self._bridge('conv3', x, memory)

    def _bridge(self, name: str, x: Tensor, memory: Optional[Memory]) -> None:
        if self.runs_alone(memory):
            return
        term = self.layers[name](pooled(x))
        memory.bridges = term if memory.bridges is None else memory.bridges + term

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        total = self.layers['last'](pooled(x))
        if memory.bridges is not None:
            total, memory.bridges = total + memory.bridges, None
        return x * self.out(self.relu(total)).sigmoid()[..., None, None]

    def fingerprint(self) -> str:
        return f'BA(reduction={self.reduction})'
