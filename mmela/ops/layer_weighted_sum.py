"""The weighted sum over layers, which is what MRLA-base adds to a network."""

from typing import Any, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked

BACKENDS = ('auto', 'reference', 'autograd', 'triton')


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
        backend (str): ``'reference'`` is plain code, differentiable any number
            of times, ``'autograd'`` its fast equal in torch operations,
            differentiable once, ``'triton'`` one kernel each for forward and
            backward, for GPUs, where no measurement stands behind it yet: at its
            first use it is compared with the others, and left with a warning where
            it fails. ``'auto'`` is ``'reference'`` where a graph is
            recorded (``torch.compile``, tracing, export), whose compiler does
            better by itself, and ``'autograd'`` elsewhere. Defaults to
            ``'auto'``.

    Returns:
        Tensor: (B, C, H, W), in data type and memory format of the values.

    Raises:
        ValueError: If there is no such backend, the number of values differs
            from ``t`` or is 0, ``C`` is no multiple of ``G``, or
            ``'triton'`` is given values in double precision.
    """
    check_backend(backend)
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
    return _LayerWeightedSum.apply(backend, attn, *values)


def check_backend(backend: str) -> None:
    """Check the name of a backend.

    Args:
        backend (str): One of ``BACKENDS``.

    Raises:
        ValueError: If it is none of them.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} does not exist; allowed are {BACKENDS}')


def reference(attn: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The sum in plain code, what the other backends are tested against.

    Args:
        attn (Tensor): Attention weights, (B, G, t).
        values (Sequence[Tensor]): ``t`` values of shape (B, C, H, W).

    Returns:
        Tensor: (B, C, H, W).
    """
    weights = chunked.per_channel(attn, values[0])
    out = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        out = torch.addcmul(out, weight, value.to(out.dtype))
    return out.to(values[0].dtype)


def is_compiling() -> bool:
    """Whether a graph is being recorded by ``torch.compile`` or exported.

    Returns:
        bool: True while it is.
    """
    # torch 2.0 has no torch.compiler
    compiler = getattr(torch, 'compiler', None)
    return compiler is not None and compiler.is_compiling()


def _kernels(backend: str, value: Tensor) -> Any:
    """Module with the ``forward`` and ``backward`` to use."""
    if backend == 'triton':
        from . import triton_kernels

        if triton_kernels.works(value.device, value.dtype):
            return triton_kernels
    return chunked


class _LayerWeightedSum(torch.autograd.Function):
    """:func:`layer_weighted_sum` with a backward pass of its own."""

    @staticmethod
    def forward(ctx, backend: str, attn: Tensor, *values: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(attn, *values)
        return _kernels(backend, values[0]).forward(attn, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        attn, *values = ctx.saved_tensors
        _, needs_attn, *needs_values = ctx.needs_input_grad
        grad_attn, grad_values = _kernels(ctx.backend, grad).backward(
            grad, attn, values, needs_attn, needs_values
        )
        return None, grad_attn, *grad_values
