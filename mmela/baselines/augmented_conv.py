from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from ..arguments import check_count, check_number
from ..layers import AttentionState, StageMemory
from ..registry import LAYER_ATTENTIONS
from .branch import (
    BranchAttention,
    Replacements,
    SummedConv2d,
    Taps,
    convolutions,
)


@LAYER_ATTENTIONS.register_module()
class AA(BranchAttention):
    r"""Attention-augmented convolution (Bello et al. 2019, section 3).

    Multi-head attention over positions, with relative positions along both axes,
    computes some of the output channels of a block's 3x3 convolution (eq. 3 to 5):

    .. math::
        \mathrm{AAConv}(X) = [\mathrm{Conv}(X), \mathrm{MHA}(X)], \quad
        l_{i,j} = q_i \cdot (k_j + r^W_{j_x - i_x} + r^H_{j_y - i_y}) /
            \sqrt{d_k^h}

    The convolution gets narrower by these channels. In a ResNet-50 the paper uses it in
    the last three stages; set ``blocks`` of the backbone. If the convolution has a
    stride, the attention works on the pooled map.

    Args:
        channels (int): Channels ``C`` of the block's output.
        keys (float): Channels of query and key as a fraction of the channels of the
            convolution. Defaults to 0.2.
        values (float): Channels of the value as a fraction of the channels of the
            convolution. Defaults to 0.1.
        heads (int): Number of heads. Channels of key and value are rounded to a
            multiple of it. Defaults to 8.
        min_key (int): Minimum number of key channels per head. Defaults to 20.
        max_size (int): Number of positions along an axis with their own embeddings;
            larger distances share the last one. Defaults to 28.
        **kwargs: ``norm_cfg`` and ``init_cfg``, see :class:`BranchAttention`.

    Raises:
        ValueError: If ``keys`` or ``values`` is not in (0, 1), or the block
            has no 3x3 convolution with one group.
    """

    needs_memory = False

    def __init__(
        self,
        channels: int,
        keys: float = 0.2,
        values: float = 0.1,
        heads: int = 8,
        min_key: int = 20,
        max_size: int = 28,
        **kwargs,
    ) -> None:
        for name, part in dict(keys=keys, values=values).items():
            check_number(name, part, 0, 1, open_low=True, open_high=True)
        for name, count in dict(
            heads=heads, min_key=min_key, max_size=max_size
        ).items():
            check_count(name, count, 1)
        super().__init__(channels, **kwargs)
        self.keys, self.values, self.heads = keys, values, heads
        self.min_key, self.max_size = min_key, max_size

    def connect(self, block: nn.Module) -> Tuple[Taps, Replacements]:
        convs = convolutions(block)
        names = [
            n for n in convs if convs[n].kernel_size == (3, 3) and convs[n].groups == 1
        ]
        if not names:
            raise ValueError(
                f'{type(block).__name__} has no 3x3 convolution with one group, which '
                'AA needs'
            )
        name = names[-1]
        conv = convs[name]
        key = max(round(self.keys * conv.out_channels / self.heads), self.min_key)
        value = max(round(self.values * conv.out_channels / self.heads), 1)
        self.key_dim, self.value_dim = key, value
        self.stride = conv.stride
        self.qkv = nn.Conv2d(conv.in_channels, self.heads * (2 * key + value), 1)
        self.out = nn.Conv2d(self.heads * value, self.heads * value, 1)
        offsets = 2 * self.max_size - 1
        self.relative_x = nn.Parameter(torch.randn(offsets, key) * key**-0.5)
        self.relative_y = nn.Parameter(torch.randn(offsets, key) * key**-0.5)
        # The convolution leaves room for the attention
        narrow = SummedConv2d(conv, conv.out_channels - self.heads * value)
        return {name: 'augment'}, {name: narrow}

    @property
    def attention_state(self) -> AttentionState:
        """AttentionState: Always active, because the convolution needs it."""
        return AttentionState.ACTIVE

    @attention_state.setter
    def attention_state(self, state: AttentionState) -> None:
        if AttentionState(state) != AttentionState.ACTIVE:
            raise ValueError(
                f'attention_state={AttentionState(state).name} is not allowed; AA '
                'must stay ACTIVE, because it computes channels of a convolution'
            )

    def augment(
        self, x: Tensor, output: Tensor, memory: Optional[StageMemory]
    ) -> Tensor:
        """Concatenate the attention to the output of the convolution.

        Args:
            x (Tensor): Input of the convolution, (B, C_in, H_in, W_in).
            output (Tensor): Its output, (B, C_out, H, W).
            memory (StageMemory, optional): Memory of the stage.

        Returns:
            Tensor: The concatenation, (B, C_out + heads * d_v, H, W).
        """
        if x.shape[2:] != output.shape[2:]:
            size = (output.shape[2], output.shape[3])
            x = nn.functional.adaptive_avg_pool2d(x, size)
        return torch.cat([output, self.attend(x, memory)], 1)

    def attend(self, x: Tensor, memory: Optional[StageMemory] = None) -> Tensor:
        height, width = x.shape[2:]
        heads, dk = self.heads, self.key_dim
        # (B, heads, H W, d) each
        split = [dk * heads, dk * heads, self.value_dim * heads]
        query, key, value = (
            part.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
            for part in self.qkv(x).split(split, 1)
        )
        query = query * dk**-0.5
        scores = query @ key.transpose(2, 3)
        grid = query.unflatten(2, (height, width))
        rows = self._embeddings(self.relative_y, height)  # (H, H, d)
        columns = self._embeddings(self.relative_x, width)
        along_y = torch.einsum('bgyxd,ykd->bgyxk', grid, rows)
        along_x = torch.einsum('bgyxd,xkd->bgyxk', grid, columns)
        scores = scores.unflatten(3, (height, width)).unflatten(2, (height, width))
        scores = scores + along_y[..., None] + along_x[..., None, :]
        attn = scores.flatten(4).flatten(2, 3).softmax(-1)
        out = (attn @ value).transpose(2, 3).flatten(1, 2)
        return self.out(out.unflatten(2, (height, width)))

    def _embeddings(self, table: Tensor, size: int) -> Tensor:
        """Embeddings of the offsets between all positions, (size, size, d)."""
        positions = torch.arange(size, device=table.device)
        offsets = positions[None] - positions[:, None]
        limit = self.max_size - 1
        return table[offsets.clamp(-limit, limit) + limit]

    def fingerprint(self) -> str:
        return (
            f'AA(keys={self.keys:g}, values={self.values:g}, heads={self.heads}, '
            f'min_key={self.min_key}, max_size={self.max_size})'
        )
