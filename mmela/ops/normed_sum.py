"""The weighted sum over layers, fused with the normalization that follows.

As separate operators, sum, normalization and ReLU each keep a map for the backward
pass. Fused, they keep at most one: the backward pass recomputes short sums from the
values, which are kept anyway; it keeps long sums; and it recomputes the normalization
from the sum.
"""

from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer_weighted_sum import needs_plain_code

# Elements of a piece, so that several pieces fit into the caches
PIECE = 2**19
# The backward pass recomputes sums of up to this many values; longer sums would take
# too long
MOST_SUMMED_AGAIN = 4


def can_norm_sum(norm: Any, values: Sequence[Tensor]) -> bool:
    """Whether :func:`normed_sum` can replace sum and normalization.

    It can on a CPU for a ``BatchNorm2d`` without hooks; in inference, also for a
    ``SyncBatchNorm`` and on any device. It does not while a graph is recorded:
    compilers fuse both operators anyway, and otherwise the fused form saves no work.

    Args:
        norm (nn.Module, optional): The normalization.
        values (Sequence[Tensor]): The values.

    Returns:
        bool: True if it can.
    """
    if (
        type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm)
        or needs_plain_code()
        or not norm.track_running_stats
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
    ):
        return False
    return _is_affine_map(norm) or (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.momentum is not None
        and values[0].device.type == 'cpu'
        and all(v.dtype == values[0].dtype for v in values)
        and norm.weight.dtype == torch.promote_types(values[0].dtype, torch.float32)
    )


def normed_sum(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    norm: Any,
    relu: bool,
) -> Tensor:
    """Normalize a weighted sum.

    Args:
        weights (Sequence[Tensor]): ``t`` weights per channel, each (B, C, 1, 1),
            in single or double precision. A single one counts as a softmax, which is
            1 and has no gradient.
        values (Sequence[Tensor]): ``t`` values, each (B, C, H, W).
        norm (nn.BatchNorm2d | nn.SyncBatchNorm): The normalization, see
            :func:`can_norm_sum`.
        relu (bool): Whether a ReLU follows; its gradient at 0 is 1.

    Returns:
        Tensor: (B, C, H, W), with the dtype and memory format of the values.
    """
    if _is_affine_map(norm):
        weights, shift = _folded(weights, norm)
        run = _sum if values[0].device.type == 'cpu' else _sum_at_once
        return run(weights, values, shift, relu)
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return _NormedSum.apply(norm, relu, norm.weight, norm.bias, *weights, *values)


def _is_affine_map(norm: nn.Module) -> bool:
    """Whether the norm only scales and shifts channels, without gradients."""
    return not norm.training and not torch.is_grad_enabled()


def _folded(weights: Sequence[Tensor], norm: Any) -> Tuple[List[Tensor], Tensor]:
    """Fold the normalization into the weights and a shift.

    ``(sum_s w_s V_s - mean) scale + bias`` equals
    ``sum_s (w_s scale) V_s + (bias - mean scale)``.

    Returns:
        tuple[list[Tensor], Tensor]: ``t`` weights, each (B, C, 1, 1), and the
        shift, (C, 1, 1).
    """
    wide = weights[0].dtype
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.to(wide)
    bias = norm.bias.to(wide) if norm.affine else 0
    shift = bias - norm.running_mean.to(wide) * scale
    if len(weights) == 1:
        weights = [torch.ones_like(weights[0])]
    return [w * scale[:, None, None] for w in weights], shift[:, None, None]


def _sum_at_once(
    weights: Sequence[Tensor], values: Sequence[Tensor], shift: Tensor, relu: bool
) -> Tensor:
    """:func:`_sum` with one pass over each value, for devices that gain no speed
    from pieces."""
    total = torch.addcmul(shift, weights[0], values[0])
    for weight, value in zip(weights[1:], values[1:]):
        total.addcmul_(weight, value)
    total = total.relu_() if relu else total
    return total.to(values[0].dtype)


def just_below_zero(dtype: torch.dtype) -> float:
    """A negative number in ``dtype``, closer to 0 than any result."""
    if dtype == torch.float16:
        return -(2.0**-24)  # its smallest normal number is much larger
    return -torch.finfo(dtype).smallest_normal


def relu_open_at_zero(out: Tensor, inplace: bool = False) -> Tensor:
    """ReLU whose gradient at 0 is 1.

    With ``zero_init`` all its inputs are 0, and the gradient of ``F.relu`` at 0, which
    is 0, would stop all learning. It avoids ``clamp_min``, whose backward pass is five
    times slower on a CPU.

    Args:
        out (Tensor): Any shape.
        inplace (bool): Write into ``out``. Defaults to False.

    Returns:
        Tensor: The same shape.
    """
    return F.threshold(out, just_below_zero(out.dtype), 0.0, inplace=inplace)


class _NormedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, norm, relu: bool, weight: Tensor, bias: Tensor, *tensors: Tensor):
        half = len(tensors) // 2
        total = _sum(tensors[:half], tensors[half:])
        stats = norm.running_mean, norm.running_var
        args = norm.training, norm.momentum, norm.eps
        out, mean, invstd = torch.native_batch_norm(total, weight, bias, *stats, *args)
        if not norm.training:  # it returns no statistics
            mean, invstd = stats[0].clone(), (stats[1] + norm.eps).rsqrt()
        kept = total if half > MOST_SUMMED_AGAIN else None
        ctx.save_for_backward(weight, bias, mean, invstd, kept, *tensors)
        ctx.relu, ctx.training, ctx.eps = relu, norm.training, norm.eps
        return relu_open_at_zero(out, inplace=True) if relu else out

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, bias, mean, invstd, kept, *tensors = ctx.saved_tensors
        var = invstd**-2
        half = len(tensors) // 2
        weights, values = tensors[:half], tensors[half:]
        if torch.is_grad_enabled():  # a second derivative is wanted
            stats = (None, None) if ctx.training else (mean, var - ctx.eps)
            out = _plain(weights, values, stats, weight, bias, ctx.eps, ctx.relu)
            inputs = [x for x in (weight, bias, *tensors) if x.requires_grad]
            grads = iter(
                torch.autograd.grad(
                    out, inputs, grad, create_graph=True, allow_unused=True
                )
            )
            needs = ctx.needs_input_grad[2:]
            return (None, None, *(next(grads) if n else None for n in needs))
        # Tensors whose memory the gradients of the values may reuse
        spare: List[Tensor] = []
        total = kept
        if total is None:
            total = _sum(weights, values)
            spare += [] if total is values[0] else [total]
        if ctx.relu:
            stats = mean, var, False, 0.0, 0.0
            normed = torch.native_batch_norm(total, weight, bias, *stats)[0]
            grad = torch.ops.aten.threshold_backward(
                grad, normed, just_below_zero(grad.dtype), grad_input=normed
            )
            spare.append(normed)
        stats = mean, var - ctx.eps, mean, invstd, ctx.training, ctx.eps
        grad, *grad_norm = torch.ops.aten.native_batch_norm_backward(
            grad, total, weight, *stats, [True] * 3
        )
        spare.append(grad)
        needs = ctx.needs_input_grad[4:]
        gradients = _gradients(grad, weights, values, needs, spare)
        return (None, None, *grad_norm, *gradients)


def _plain(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    stats: Tuple[Optional[Tensor], Optional[Tensor]],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """:func:`normed_sum` in operators that autograd can differentiate."""
    total = values[0]
    if len(values) > 1:
        products = (w * v for w, v in zip(weights, values))
        total = sum(products, torch.zeros(())).to(total.dtype)
    out = F.batch_norm(total, *stats, weight, bias, stats[0] is None, 0.0, eps)
    return relu_open_at_zero(out) if relu else out


def _pieces(value: Tensor) -> Iterator[slice]:
    """Slices of samples to process together."""
    step = max(1, PIECE // value[0].numel())
    return (slice(i, i + step) for i in range(0, len(value), step))


def _scratch(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate memory for a piece."""
    return torch.empty_like(value[next(_pieces(value))], dtype=dtype)


def _sum(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    shift: Optional[Tensor] = None,
    relu: bool = False,
) -> Tensor:
    """``sum_s weights[s] * values[s]``, computed in the dtype of the weights.

    It adds ``shift``, (C, 1, 1), and applies a ReLU, if asked to.
    """
    if len(values) == 1 and shift is None:
        return values[0]
    total = torch.empty_like(values[0])
    wide = weights[0].dtype
    same = wide == total.dtype
    scratch = [] if same else [_scratch(total, wide) for _ in range(2)]
    for s in _pieces(total):
        out = total[s]
        part = out if same else scratch[0][: len(out)]
        for index, (w, v) in enumerate(zip(weights, values)):
            v = v[s] if same else scratch[1][: len(out)].copy_(v[s])
            if index:
                part.addcmul_(w[s], v)
            else:
                torch.mul(w[s], v, out=part)
        if shift is not None:
            part.add_(shift)
        if relu:
            part.relu_()
        if not same:
            out.copy_(part)
    return total


def _gradients(
    grad: Tensor,
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    needs: Sequence[bool],
    spare: List[Tensor],
) -> List[Optional[Tensor]]:
    """Gradients of :func:`_sum`; the last of ``spare`` is ``grad``."""
    if len(values) == 1:
        return [torch.zeros_like(weights[0]), grad]
    wide = weights[0].dtype
    same = wide == grad.dtype
    grad_weights: List[Optional[Tensor]] = []
    grad_values: List[Optional[Tensor]] = []
    for x, need in zip(weights, needs):
        grad_weights.append(torch.empty_like(x) if need else None)
    # In reverse order, because the last one reuses the memory of `grad`
    for x, need in zip(values[::-1], needs[::-1]):
        out = spare.pop() if spare else torch.empty_like(x)
        grad_values.insert(0, out if need else None)
    scratch = [_scratch(values[0], wide) for _ in range(1 if same else 2)]
    for s in _pieces(grad):
        g = grad[s]
        product = scratch[0][: len(g)]
        if not same:
            g = scratch[1][: len(g)].copy_(g)
        for w, v, grad_w, grad_v in zip(weights, values, grad_weights, grad_values):
            if grad_w is not None:
                v = v[s] if same else product.copy_(v[s])
                torch.mul(g, v, out=product)
                torch.sum(product, (2, 3), keepdim=True, out=grad_w[s])
            if grad_v is not None:
                if same:
                    torch.mul(w[s], g, out=grad_v[s])
                else:
                    grad_v[s].copy_(torch.mul(w[s], g, out=product))
    return [*grad_weights, *grad_values]
