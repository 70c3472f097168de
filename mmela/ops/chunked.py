"""The weighted sum over layers in torch operations that copy no value.

The batch is worked through in chunks, so that what all layers share (the
output, its gradient) and the one temporary stay in the cache while the values
pass by. Each value is read once from memory and each gradient written once.
"""

from typing import Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

# Elements of a chunk: 4 MiB in single precision. Of 2^14 to 2^24 the fastest
# on a CPU; smaller chunks cost calls, larger ones fall out of the cache.
CHUNK = 1 << 20


def forward(attn: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Sum the values, see :func:`mmela.ops.layer_weighted_sum`.

    Args:
        attn (Tensor): (B, G, t).
        values (Sequence[Tensor]): ``t`` values, (B, C, H, W).

    Returns:
        Tensor: (B, C, H, W), with the data type and layout of the values.
    """
    out = torch.empty_like(values[0])
    weights = per_channel(attn, values[0])
    wide = weights[0].dtype
    for part in _chunks(out):
        total = out[part]
        if wide != out.dtype:  # half precision: sum in single precision
            total = torch.empty_like(total, dtype=wide)
        torch.mul(weights[0][part], values[0][part], out=total)
        for weight, value in zip(weights[1:], values[1:]):
            total.addcmul_(weight[part], value[part].to(wide))
        if wide != out.dtype:
            out[part] = total
    return out


def backward(
    grad: Tensor,
    attn: Tensor,
    values: Sequence[Tensor],
    needs_attn: bool,
    needs_values: Sequence[bool],
) -> Tuple[Optional[Tensor], List[Optional[Tensor]]]:
    """Gradients of :func:`forward`.

    Args:
        grad (Tensor): Gradient of the output, (B, C, H, W).
        attn (Tensor): (B, G, t).
        values (Sequence[Tensor]): ``t`` values, (B, C, H, W).
        needs_attn (bool): Whether the gradient of ``attn`` is wanted.
        needs_values (Sequence[bool]): Whether that of each value is.

    Returns:
        tuple[Tensor | None, list[Tensor | None]]: The gradients of ``attn``
        and of each value, None where they are not wanted.
    """
    heads = attn.size(1)
    weights = per_channel(attn, grad)
    wide = weights[0].dtype
    grad_attn = attn.new_empty(attn.shape) if needs_attn else None
    grad_values = [
        torch.empty_like(value) if need else None
        for value, need in zip(values, needs_values)
    ]
    product = None
    for part in _chunks(values[0]):
        g = grad[part].to(wide)
        for s, value in enumerate(values):
            if grad_attn is not None:
                if product is None:  # the first chunk is the largest
                    product = torch.empty_like(value[part], dtype=wide)
                v = value[part]
                dot = torch.mul(g, v, out=product[: len(v)]).sum((2, 3))
                grad_attn[part, :, s] = dot.unflatten(1, (heads, -1)).sum(-1)
            grad_value = grad_values[s]
            if grad_value is not None:
                torch.mul(weights[s][part], g, out=grad_value[part])
    return grad_attn, grad_values


def per_channel(attn: Tensor, value: Tensor) -> Tuple[Tensor, ...]:
    """(B, G, t) to ``t`` tensors (B, C, 1, 1), in at least single precision.

    They are tiny beside one value.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    size = value.size(1) // attn.size(1)
    # No repeat_interleave: the ONNX exporter of torch 2.0 gets its shape wrong
    weights = attn.to(wide).unsqueeze(2).expand(-1, -1, size, -1).flatten(1, 2)
    return weights.permute(2, 0, 1)[..., None, None].unbind()


def _chunks(value: Tensor) -> Iterator[slice]:
    """Parts of the batch of about ``CHUNK`` elements, at least one sample."""
    batch = value.size(0)
    step = max(1, CHUNK * batch // max(1, value.numel()))
    for start in range(0, batch, step):
        yield slice(start, start + step)
