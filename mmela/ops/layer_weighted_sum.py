from importlib.util import find_spec
from typing import List, Optional, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import lean

BACKENDS = ('auto', 'reference', 'autograd', 'triton')


def layer_weighted_sum(attn: Tensor,
                       values: Sequence[Tensor],
                       backend: str = 'auto') -> Tensor:
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
        backend (str): ``'reference'`` is plain differentiable code,
            ``'autograd'`` its fast equal in torch operations, differentiable
            once, ``'triton'`` one kernel each for forward and backward, for
            GPUs. ``'auto'`` takes ``'triton'`` for values on a CUDA device
            where Triton is installed and the kernels read them as they are,
            and otherwise ``'autograd'``. Defaults to ``'auto'``.

    Returns:
        Tensor: (B, C, H, W), in data type and memory format of the values.

    Raises:
        ValueError: If there is no such backend, the number of values differs
            from ``t`` or is 0, ``C`` is no multiple of ``G``, or
            ``'triton'`` is given values in double precision.
    """
    check_backend(backend)
    if attn.size(-1) != len(values) or not values:
        raise ValueError(f'attn has weights for {attn.size(-1)} layers, '
                         f'but {len(values)} values are given')
    channels, heads = values[0].size(1), attn.size(1)
    if channels % heads:
        raise ValueError(f'{channels} channels cannot be shared out among '
                         f'{heads} heads')
    # A traced graph (TorchScript, ONNX, FLOP counters) knows torch's own
    # operators alone.
    if backend == 'reference' or torch.jit.is_tracing() or _is_exporting():
        return reference(attn, values)
    if _custom_op is not None and _is_compiling():
        return _custom_op(attn, list(values), backend)
    return _LayerWeightedSum.apply(backend, attn, *values)


def check_backend(backend: str) -> None:
    """Check the name of a backend.

    Args:
        backend (str): One of ``BACKENDS``.

    Raises:
        ValueError: If it is none of them.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f'backend={backend!r} does not exist; allowed are {BACKENDS}')


def reference(attn: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The sum in plain code, what the other backends are tested against.

    Args:
        attn (Tensor): Attention weights, (B, G, t).
        values (Sequence[Tensor]): ``t`` values of shape (B, C, H, W).

    Returns:
        Tensor: (B, C, H, W).
    """
    dtype = values[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    weights = attn.to(wide).repeat_interleave(
        values[0].size(1) // attn.size(1), dim=1)
    weights = weights.permute(2, 0, 1)[..., None, None].unbind()
    out = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        out = torch.addcmul(out, weight, value.to(wide))
    return out.to(dtype)


def _kernels(backend: str, values: Sequence[Tensor]):
    """Module with the ``forward`` and ``backward`` to use."""
    if backend == 'autograd' or backend == 'auto' and not (
            values[0].is_cuda and find_spec('triton')):
        return lean
    from . import triton_kernels
    if backend == 'auto' and not triton_kernels.fits(values):
        return lean
    return triton_kernels


class _LayerWeightedSum(torch.autograd.Function):
    """:func:`layer_weighted_sum` outside of ``torch.compile``."""

    @staticmethod
    def forward(ctx, backend: str, attn: Tensor, *values: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(attn, *values)
        return _kernels(backend, values).forward(attn, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        attn, *values = ctx.saved_tensors
        _, needs_attn, *needs_values = ctx.needs_input_grad
        grad_attn, grad_values = _kernels(ctx.backend, values).backward(
            grad, attn, values, needs_attn, needs_values)
        return None, grad_attn, *grad_values


def _is_compiling() -> bool:
    # torch 2.0 has no torch.compiler
    compiler = getattr(torch, 'compiler', None)
    return compiler is not None and compiler.is_compiling()


def _is_exporting() -> bool:
    if torch.onnx.is_in_onnx_export():
        return True
    compiler = getattr(torch, 'compiler', None)
    # torch 2.7 and later
    exporting = getattr(compiler, 'is_exporting', None)
    return exporting is not None and exporting()


def _register():
    """Register the sum as one operator, which ``torch.compile`` keeps whole.

    Returns:
        callable | None: The operator; None before torch 2.4, which has no
        custom operators in Python.
    """
    if not hasattr(torch.library, 'custom_op'):
        return None

    @torch.library.custom_op('mmela::layer_weighted_sum', mutates_args=())
    def forward_op(attn: Tensor, values: Sequence[Tensor],
                   backend: str) -> Tensor:
        return _kernels(backend, values).forward(attn, values)

    @forward_op.register_fake
    def _(attn, values, backend):
        return torch.empty_like(values[0])

    # An operator returns no None: an empty tensor stands for an unneeded
    # gradient.
    @torch.library.custom_op(
        'mmela::layer_weighted_sum_backward', mutates_args=())
    def backward_op(grad: Tensor, attn: Tensor, values: Sequence[Tensor],
                    needs: Sequence[bool], backend: str) -> List[Tensor]:
        grad_attn, grad_values = _kernels(backend, values).backward(
            grad, attn, values, needs[0], needs[1:])
        return [
            attn.new_empty(0) if g is None else g
            for g in (grad_attn, *grad_values)
        ]

    @backward_op.register_fake
    def _(grad, attn, values, needs, backend):
        return [
            torch.empty_like(x) if need else attn.new_empty(0)
            for x, need in zip((attn.contiguous(), *values), needs)
        ]

    def setup_context(ctx, inputs, output) -> None:
        attn, values, ctx.backend = inputs
        ctx.save_for_backward(attn, *values)

    def backward(ctx, grad: Tensor):
        attn, *values = ctx.saved_tensors
        needs_attn, needs_values, _ = ctx.needs_input_grad
        needs = [needs_attn, *needs_values]
        grads: List[Optional[Tensor]] = list(
            backward_op(grad, attn, values, needs, ctx.backend))
        grads = [g if need else None for g, need in zip(grads, needs)]
        return grads[0], grads[1:], None

    forward_op.register_autograd(backward, setup_context=setup_context)
    return forward_op


_custom_op = _register()
