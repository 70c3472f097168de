"""The weighted sum over layers, which is what MRLA-base adds to a network."""

import warnings
from typing import Callable, Sequence, Tuple

import torch
from torch import Tensor

from ..arguments import check_choice

BACKENDS = ('auto', 'reference', 'autograd', 'compile')


def layer_weighted_sum(
    attn: Tensor, values: Sequence[Tensor], backend: str = 'auto'
) -> Tensor:
    """Sum the values of several layers, each head with its own weights.

    Computes ``O[b, c] = sum_s attn[b, g(c), s] * values[s][b, c]`` where
    ``g(c) = c // (C / G)`` is the head of channel ``c`` (MRLA, eq. 9, without
    the softmax). The values are neither concatenated nor copied; for the
    backward pass only references to ``attn`` and the values are kept. Values
    in half precision are summed in single precision.

    Args:
        attn (Tensor): Attention weights, (B, G, t).
        values (Sequence[Tensor]): ``t`` values of shape (B, C, H, W), where
            ``C`` is a multiple of ``G``.
        backend (str): ``'reference'`` is plain code, for every transform that
            torch has, ``'autograd'`` the same with sums in place. ``'auto'`` is
            ``'reference'`` where a graph is recorded (``torch.compile``, tracing,
            export), whose compiler does better by itself, and ``'autograd'``
            elsewhere. ``'compile'`` is for a whole attention, see
            :class:`CompiledForward`; for the sum it means ``'auto'``. Defaults to
            ``'auto'``.

    Returns:
        Tensor: (B, C, H, W), in data type and memory format of the values.

    Raises:
        ValueError: If there is no such backend, the number of values differs
            from ``t`` or is 0, or ``C`` is no multiple of ``G``.
    """
    backend = check_backend(backend)
    if attn.size(-1) != len(values) or not values:
        raise ValueError(
            f'attn has weights for {attn.size(-1)} layers, '
            f'but {len(values)} values are given'
        )
    channels, heads = values[0].size(1), attn.size(1)
    if channels % heads:
        raise ValueError(
            f'{channels} channels cannot be shared out among {heads} heads'
        )
    if backend == 'reference' or is_compiling() or torch.jit.is_tracing():
        return reference(attn, values)
    return _sum(attn, values, _Add.apply)


def reference(attn: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The sum in plain code, what all else is compared with.

    Args:
        attn (Tensor): (B, G, t).
        values (Sequence[Tensor]): ``t`` values, (B, C, H, W).

    Returns:
        Tensor: (B, C, H, W).
    """
    # No addcmul: in half precision it keeps a wide copy of each value
    return _sum(attn, values, lambda total, weight, value: total + weight * value)


def _sum(attn: Tensor, values: Sequence[Tensor], add: Callable) -> Tensor:
    weights = per_channel(attn, values[0])
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        total = add(total, weight, value)
    return total.to(values[0].dtype)


def check_backend(backend: str) -> str:
    """Check the name of a backend.

    Args:
        backend (str): One of ``BACKENDS``, or ``'triton'``, which configs for
            mmela 0.1 may have.

    Returns:
        str: The backend; ``'compile'`` in place of ``'triton'``, with a warning.

    Raises:
        ValueError: If it is none of them.
    """
    if backend == 'triton':
        warnings.warn(
            "backend='triton' is no more; 'compile' takes its place", stacklevel=3
        )
        return 'compile'
    check_choice('backend', backend, BACKENDS)
    return backend


def per_channel(attn: Tensor, value: Tensor) -> Tuple[Tensor, ...]:
    """Give each channel the weights of its head.

    Args:
        attn (Tensor): Weights, (B, G, t).
        value (Tensor): A value, (B, C, H, W).

    Returns:
        tuple[Tensor]: ``t`` tensors (B, C, 1, 1), in at least single precision;
        they are tiny beside one value.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    size = value.size(1) // attn.size(1)
    # No repeat_interleave: the ONNX exporter of torch 2.0 gets its shape wrong
    weights = attn.to(wide).unsqueeze(2).expand(-1, -1, size, -1).flatten(1, 2)
    return weights.permute(2, 0, 1)[..., None, None].unbind()


def is_compiling() -> bool:
    """Whether a graph is being recorded by ``torch.compile`` or exported.

    Returns:
        bool: True while it is.
    """
    # torch 2.0 has no torch.compiler
    compiler = getattr(torch, 'compiler', None)
    return compiler is not None and compiler.is_compiling()


class _Add(torch.autograd.Function):
    """``total + weight * value``, added in place.

    A fresh tensor for each product and each sum takes a CPU as long to get as
    to fill.
    """

    @staticmethod
    def forward(ctx, total: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weight, value)
        ctx.mark_dirty(total)
        return total.addcmul_(weight, value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, value = ctx.saved_tensors
        _, needs_weight, needs_value = ctx.needs_input_grad
        return (
            grad,
            (grad * value).sum((2, 3), keepdim=True) if needs_weight else None,
            (weight * grad).to(value.dtype) if needs_value else None,
        )
