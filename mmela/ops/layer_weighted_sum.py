from typing import Sequence

import torch
from torch import Tensor


def layer_weighted_sum(attn: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Sum the values of several layers, each head with its own weights.

    Computes ``O[b, c] = sum_s attn[b, g(c), s] * values[s][b, c]`` where
    ``g(c) = c // (C / G)`` is the head of channel ``c`` (MRLA, eq. 9, without
    the softmax). The values are neither concatenated nor copied.

    Args:
        attn (Tensor): Attention weights, (B, G, t).
        values (Sequence[Tensor]): ``t`` values of shape (B, C, H, W), where
            ``C`` is a multiple of ``G``.

    Returns:
        Tensor: (B, C, H, W), in the memory format of the values.

    Raises:
        ValueError: If the number of values differs from ``t`` or ``C`` is no
            multiple of ``G``.
    """
    if attn.size(-1) != len(values):
        raise ValueError(f'attn has weights for {attn.size(-1)} layers, '
                         f'but {len(values)} values are given')
    channels, heads = values[0].size(1), attn.size(1)
    if channels % heads:
        raise ValueError(f'{channels} channels cannot be shared out among '
                         f'{heads} heads')
    # (t, B, C, 1, 1): tiny beside one value
    weights = attn.repeat_interleave(channels // heads, dim=1)
    weights = weights.permute(2, 0, 1)[..., None, None].unbind()
    out = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        out = torch.addcmul(out, weight, value)
    return out
