"""The weighted sum over layers, the core of MRLA-base."""

import warnings
from typing import Callable, Sequence, Tuple

import torch
from torch import Tensor

from ..arguments import check_choice

BACKENDS = ('auto', 'reference', 'autograd', 'compile')


def layer_weighted_sum(
    attn: Tensor, values: Sequence[Tensor], backend: str = 'auto'
) -> Tensor:
    """Sum the values of several layers, with separate weights for each head.

    Computes ``O[b, c] = sum_s attn[b, g(c), s] * values[s][b, c]`` where
    ``g(c) = c // (C / G)`` is the head of channel ``c`` (MRLA, eq. 9, without the
    softmax). It does not concatenate or copy the values, and keeps only references to
    them and to ``attn`` for the backward pass. It sums half-precision values in single
    precision.

    Args:
        attn (Tensor): Attention weights, (B, G, t).
        values (Sequence[Tensor]): ``t`` values of shape (B, C, H, W), where
            ``C`` is a multiple of ``G``.
        backend (str): ``'reference'``: plain code, which works with every transform of
            torch. ``'autograd'``: the same with in-place sums. ``'auto'``:
            ``'reference'`` while a graph is recorded (``torch.compile``, tracing,
            export), since its compiler optimizes better, and ``'autograd'``
            otherwise. ``'compile'`` is for a whole attention, see
            :class:`CompiledForward`; for the sum it means ``'auto'``. Defaults to
            ``'auto'``.

    Returns:
        Tensor: (B, C, H, W), with the dtype and memory format of the values.

    Raises:
        ValueError: If the backend is unknown, if the number of values is 0 or differs
            from ``t``, or if ``C`` is not a multiple of ``G``.
    """
    backend = check_backend(backend)
    if attn.size(-1) != len(values) or not values:
        raise ValueError(
            f'attn has weights for {attn.size(-1)} layers, but there are '
            f'{len(values)} values; give one value per layer'
        )
    channels, heads = values[0].size(1), attn.size(1)
    if channels % heads:
        raise ValueError(f'{heads} heads do not divide {channels} channels')
    if backend == 'reference' or needs_plain_code():
        return reference(attn, values)
    return _sum(attn, values, _Add.apply)


def reference(attn: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The sum in plain code, the reference for other implementations.

    Args:
        attn (Tensor): (B, G, t).
        values (Sequence[Tensor]): ``t`` values, (B, C, H, W).

    Returns:
        Tensor: (B, C, H, W).
    """
    # Not addcmul, which keeps a single-precision copy of each half-precision value
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
        backend (str): One of ``BACKENDS``, or ``'triton'`` from a config for mmela
            0.1.

    Returns:
        str: The backend; ``'compile'`` for ``'triton'``, with a warning.

    Raises:
        ValueError: If the backend is unknown.
    """
    if backend == 'triton':
        warnings.warn(
            "backend='triton' no longer exists; using 'compile' instead", stacklevel=3
        )
        return 'compile'
    check_choice('backend', backend, BACKENDS)
    return backend


def per_channel(attn: Tensor, value: Tensor) -> Tuple[Tensor, ...]:
    """Expand weights of heads to channels.

    Args:
        attn (Tensor): Weights, (B, G, t).
        value (Tensor): A value, (B, C, H, W).

    Returns:
        tuple[Tensor]: ``t`` tensors (B, C, 1, 1), in at least single precision.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    size = value.size(1) // attn.size(1)
    # Not repeat_interleave, whose shape the ONNX exporter of torch 2.0 gets wrong
    weights = attn.to(wide).unsqueeze(2).expand(-1, -1, size, -1).flatten(1, 2)
    return weights.permute(2, 0, 1)[..., None, None].unbind()


def is_compiling() -> bool:
    """Whether ``torch.compile`` or an export is recording a graph.

    Returns:
        bool: True during the recording.
    """
    # torch 2.0 has no torch.compiler
    compiler = getattr(torch, 'compiler', None)
    return compiler is not None and compiler.is_compiling()


def needs_plain_code() -> bool:
    """Whether a graph is recorded or ``torch.func`` transforms the code.

    Returns:
        bool: If True, autograd functions of our own cannot run.
    """
    return (
        is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class _Add(torch.autograd.Function):
    """``total + weight * value``, computed in place.

    On a CPU, allocating a tensor for each product and sum takes as long as filling it.
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
