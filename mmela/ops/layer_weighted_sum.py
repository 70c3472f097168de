from functools import lru_cache
from importlib.util import find_spec
from typing import List, Optional, Sequence, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import lean

BACKENDS = ('auto', 'reference', 'autograd', 'triton')


class SharedValue:
    """A value that several sums of one stage will use.

    Without it, each of the ``T - s + 1`` sums that a value takes part in makes
    a gradient of the value's size, and autograd adds them up. With it the sums
    leave only references to their own output gradients behind, and one pass
    over these makes the gradient of the value: it is their weighted sum.

    Make one by :func:`share_value`.

    Attributes:
        tensor (Tensor): The value, (B, C, H, W), without its graph.
        token (Tensor): A scalar in the graph. Its edges see to it that the
            value's gradient is made after the backward passes of all sums.
        ledger (list[tuple[int, Tensor, Tensor]]): Of each sum whose backward
            pass has run: number of the pass, weights (B, G) and output
            gradient (B, C, H, W).
    """

    def __init__(self, tensor: Tensor, token: Tensor, ledger: list) -> None:
        self.tensor = tensor
        self.token = token
        self.ledger = ledger

    @property
    def dtype(self) -> torch.dtype:
        """torch.dtype: Data type of the value."""
        return self.tensor.dtype


Value = Union[Tensor, SharedValue]


def share_value(
    value: Tensor, after: Optional[Value] = None, backend: str = 'auto'
) -> Value:
    """Prepare a value for the sums of this and the later blocks of its stage.

    Args:
        value (Tensor): Value of a block, (B, C, H, W).
        after (Tensor | SharedValue, optional): What this returned for the
            block before. Defaults to None.
        backend (str): That of the sums. Defaults to ``'auto'``.

    Returns:
        Tensor | SharedValue: To hand to :func:`layer_weighted_sum`; the value
        itself where there is nothing to gain.
    """
    if (
        backend == 'reference'
        or not value.requires_grad
        or not torch.is_grad_enabled()
        or is_symbolic()
    ):
        return value
    ledger: list = []
    token = after.token if isinstance(after, SharedValue) else None
    token = _Share.apply(value, token, ledger, backend)
    return SharedValue(value.detach(), token, ledger)


def layer_weighted_sum(
    attn: Tensor, values: Sequence[Value], backend: str = 'auto'
) -> Tensor:
    """Sum the values of several layers, each head with its own weights.

    Computes ``O[b, c] = sum_s attn[b, g(c), s] * values[s][b, c]`` where
    ``g(c) = c // (C / G)`` is the head of channel ``c`` (MRLA, eq. 9, without
    the softmax). The values are neither concatenated nor copied; for the
    backward pass only references to ``attn`` and the values are kept. Values
    in half precision are summed in single precision.

    Args:
        attn (Tensor): Attention weights, (B, G, t).
        values (Sequence[Tensor | SharedValue]): ``t`` values of shape
            (B, C, H, W), where ``C`` is a multiple of ``G``.
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
        raise ValueError(
            f'attn has weights for {attn.size(-1)} layers, '
            f'but {len(values)} values are given'
        )
    shared = [v if isinstance(v, SharedValue) else None for v in values]
    tensors = [v.tensor if isinstance(v, SharedValue) else v for v in values]
    channels, heads = tensors[0].size(1), attn.size(1)
    if channels % heads:
        raise ValueError(
            f'{channels} channels cannot be shared out among {heads} heads'
        )
    # A traced graph (TorchScript, ONNX, FLOP counters) knows torch's own
    # operators alone.
    if backend == 'reference' or torch.jit.is_tracing() or _is_exporting():
        return reference(attn, tensors)
    if _custom_op is not None and _is_compiling():
        return _custom_op(attn, tensors, backend)
    # The last token depends on those before
    token = next((v.token for v in reversed(shared) if v is not None), None)
    return _LayerWeightedSum.apply(backend, shared, token, attn, *tensors)


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
    dtype = values[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    weights = attn.to(wide).repeat_interleave(values[0].size(1) // attn.size(1), dim=1)
    weights = weights.permute(2, 0, 1)[..., None, None].unbind()
    out = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        out = torch.addcmul(out, weight, value.to(wide))
    return out.to(dtype)


@lru_cache(maxsize=None)
def _has_triton() -> bool:
    return find_spec('triton') is not None


def _kernels(backend: str, values: Sequence[Tensor]):
    """Module with the ``forward`` and ``backward`` to use."""
    if (
        backend == 'autograd'
        or backend == 'auto'
        and not (values[0].is_cuda and _has_triton())
    ):
        return lean
    from . import triton_kernels

    if backend == 'auto' and not triton_kernels.fits(values):
        return lean
    return triton_kernels


class _LayerWeightedSum(torch.autograd.Function):
    """:func:`layer_weighted_sum` outside of ``torch.compile``."""

    @staticmethod
    def forward(
        ctx,
        backend: str,
        shared: List[Optional[SharedValue]],
        token: Optional[Tensor],
        attn: Tensor,
        *values: Tensor,
    ) -> Tensor:
        ctx.backend = backend
        ctx.ledgers = [None if v is None else v.ledger for v in shared]
        ctx.save_for_backward(attn, *values)
        return _kernels(backend, values).forward(attn, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        attn, *values = ctx.saved_tensors
        _, _, needs_shared, needs_attn, *needs_values = ctx.needs_input_grad
        grad_attn, grad_values = _kernels(ctx.backend, values).backward(
            grad, attn, values, needs_attn, needs_values
        )
        if needs_shared:
            for s, ledger in enumerate(ctx.ledgers):
                if ledger is not None:
                    ledger.append((_backward_id(), attn[..., s], grad))
        token = grad.new_zeros(()) if needs_shared else None
        return None, None, token, grad_attn, *grad_values


class _Share(torch.autograd.Function):
    """Make the token of a :class:`SharedValue`, and its value's gradient."""

    @staticmethod
    def forward(
        ctx, value: Tensor, token: Optional[Tensor], ledger: list, backend: str
    ) -> Tensor:
        ctx.ledger = ledger
        ctx.backend = backend
        return value.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        # Not what an earlier pass, for other gradients alone, has left behind
        entries = [e[1:] for e in ctx.ledger if e[0] == _backward_id()]
        ctx.ledger.clear()
        token = grad if ctx.needs_input_grad[1] else None
        if not entries:  # no sum of it is part of what is differentiated
            return None, token, None, None
        weights = torch.stack([weight for weight, _ in entries], dim=-1)
        grads = [grad for _, grad in entries]
        total = _kernels(ctx.backend, grads).forward(weights, grads)
        return total, token, None, None


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


def _backward_id() -> int:
    """Number of the backward pass that is running."""
    number = getattr(torch._C, '_current_graph_task_id', None)
    return -1 if number is None else number()


def is_symbolic() -> bool:
    """Whether the graph is recorded, and not run."""
    return torch.jit.is_tracing() or _is_exporting() or _is_compiling()


def _register():
    """Register the sum as one operator, which ``torch.compile`` keeps whole.

    Returns:
        callable | None: The operator; None before torch 2.4, which has no
        custom operators in Python.
    """
    if not hasattr(torch.library, 'custom_op'):
        return None

    @torch.library.custom_op('mmela::layer_weighted_sum', mutates_args=())
    def forward_op(attn: Tensor, values: Sequence[Tensor], backend: str) -> Tensor:
        return _kernels(backend, values).forward(attn, values)

    @forward_op.register_fake
    def _(attn, values, backend):
        return torch.empty_like(values[0])

    # An operator returns no None: an empty tensor stands for an unneeded
    # gradient.
    @torch.library.custom_op('mmela::layer_weighted_sum_backward', mutates_args=())
    def backward_op(
        grad: Tensor,
        attn: Tensor,
        values: Sequence[Tensor],
        needs: Sequence[bool],
        backend: str,
    ) -> List[Tensor]:
        grad_attn, grad_values = _kernels(backend, values).backward(
            grad, attn, values, needs[0], needs[1:]
        )
        return [
            attn.new_empty(0) if g is None else g for g in (grad_attn, *grad_values)
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
            backward_op(grad, attn, values, needs, ctx.backend)
        )
        grads = [g if need else None for g, need in zip(grads, needs)]
        return grads[0], grads[1:], None

    forward_op.register_autograd(backward, setup_context=setup_context)
    return forward_op


_custom_op = _register()
