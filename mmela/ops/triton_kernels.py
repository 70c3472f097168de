"""The weighted sum over layers as Triton kernels, one pass over all values.

The values stay where they are: a small tensor of their addresses tells the
kernels where. One program works on a piece of one head of one sample, so a
weight is a scalar to it. Sums are in single precision.

Importing this needs Triton. With the environment variable
``TRITON_INTERPRET=1`` the kernels run on a CPU, slowly, for tests.
"""

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements per program (a power of two) and its warps, by name of the GPU, then by
# kernel, layout and size of an element. tools/benchmark/tune.py measures them.
# 'default' is for GPUs that are not in it, and no measurement stands behind it.
BLOCKS_FILE = Path(
    os.environ.get('MMELA_TRITON_BLOCKS')
    or Path(__file__).with_name('triton_blocks.json')
)
BLOCKS: Dict[str, Dict[str, Any]] = json.loads(BLOCKS_FILE.read_text())


@triton.jit
def _offsets(
    size,
    channels,
    HEAD_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offsets of a program's elements in a value, and which of them exist.

    ``size`` is H * W. The head ``row = b * G + g`` is contiguous in NCHW; in
    NHWC its ``HEAD_DIM`` channels lie side by side at each pixel.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < HEAD_DIM * size
    if CHANNELS_LAST:
        heads = channels // HEAD_DIM
        sample = row // heads
        head = row % heads
        start = sample * channels * size + head * HEAD_DIM
        offsets = start + (n // HEAD_DIM) * channels + n % HEAD_DIM
    else:
        offsets = row * HEAD_DIM * size + n
    return offsets, mask


@triton.jit
def _forward_kernel(
    attn,
    values,
    out,
    layers,
    size,
    channels,
    HEAD_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = sum_s attn[s] * values[s]``."""
    offsets, mask = _offsets(size, channels, HEAD_DIM, CHANNELS_LAST, BLOCK)
    pointer = tl.pointer_type(out.dtype.element_ty)
    weights = attn + tl.program_id(0).to(tl.int64) * layers
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(0, layers):
        # The compiler cannot know that all values are aligned
        value = tl.multiple_of(tl.load(values + s).to(pointer), 16)
        v = tl.load(value + offsets, mask=mask, other=0).to(tl.float32)
        total += tl.load(weights + s).to(tl.float32) * v
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad,
    attn,
    values,
    grad_values,
    dots,
    layers,
    size,
    channels,
    HEAD_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NEEDS_ATTN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of all values and the parts of that of ``attn``.

    ``grad`` is read once. ``dots`` (blocks, B * G, t) takes each program's
    part of the scalar products, so that their sum is deterministic. A zero
    among the addresses ``grad_values`` means that the gradient is not wanted.
    """
    offsets, mask = _offsets(size, channels, HEAD_DIM, CHANNELS_LAST, BLOCK)
    pointer = tl.pointer_type(grad.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    part = dots + (block * tl.num_programs(0) + row) * layers
    g = tl.load(grad + offsets, mask=mask, other=0).to(tl.float32)
    for s in range(0, layers):
        if NEEDS_ATTN:
            value = tl.multiple_of(tl.load(values + s).to(pointer), 16)
            v = tl.load(value + offsets, mask=mask, other=0).to(tl.float32)
            tl.store(part + s, tl.sum(g * v, 0))
        address = tl.load(grad_values + s)
        if address != 0:
            weight = tl.load(attn + row * layers + s).to(tl.float32)
            target = tl.multiple_of(address.to(pointer), 16)
            tl.store(
                target + offsets, (weight * g).to(grad.dtype.element_ty), mask=mask
            )


@lru_cache(maxsize=None)
@torch.inference_mode(False)  # whatever the first use runs in
def works(device: torch.device, dtype: torch.dtype, reference: Callable) -> bool:
    """Whether the kernels agree with plain torch operations on a device.

    They are tried once per device and data type on a small input; where they
    fail, a warning says why.

    Args:
        device (torch.device): Where the values are.
        dtype (torch.dtype): Their data type.
        reference (callable): The sum in plain code.

    Returns:
        bool: True if forward and backward pass agree; also for double
        precision, which the kernels refuse by an error of their own.
    """
    if dtype == torch.float64:
        return True
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    half = torch.finfo(dtype).bits == 16
    tolerance: Dict[str, Any] = dict(rtol=2e-2, atol=2e-2) if half else {}
    try:
        for form in (torch.contiguous_format, torch.channels_last):
            attn = random(2, 4, 3)
            grad, *values = [
                random(2, 32, 5, 3).to(memory_format=form) for _ in range(4)
            ]
            out = forward(attn, values)
            grad_attn, grad_values = backward(grad, attn, values, True, [True] * 3)
            with torch.enable_grad():
                inputs = [x.requires_grad_() for x in (attn, *values)]
                expected = reference(attn, values)
                gradients = torch.autograd.grad(expected, inputs, grad)
            torch.testing.assert_close(
                [out, grad_attn, *grad_values], [expected, *gradients], **tolerance
            )
    except Exception as error:  # a compiler and a driver may raise anything
        warnings.warn(
            f"backend='triton' does not work on {device} in {dtype}, 'autograd' takes "
            f'its place: {str(error).strip().splitlines()[:1]}',
            stacklevel=2,
        )
        return False
    return True


class LayerWeightedSum(torch.autograd.Function):
    """:func:`mmela.ops.layer_weighted_sum` by :func:`forward` and :func:`backward`."""

    @staticmethod
    def forward(ctx, attn: Tensor, *values: Tensor) -> Tensor:
        ctx.save_for_backward(attn, *values)
        return forward(attn, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        attn, *values = ctx.saved_tensors
        needs_attn, *needs_values = ctx.needs_input_grad
        grad_attn, grad_values = backward(grad, attn, values, needs_attn, needs_values)
        return grad_attn, *grad_values


def forward(attn: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Sum the values, see :func:`mmela.ops.layer_weighted_sum`.

    Args:
        attn (Tensor): (B, G, t).
        values (Sequence[Tensor]): ``t`` values, (B, C, H, W). What is not
            contiguous, channels_last or aligned to 16 bytes, or of another data
            type than the first, is copied first.

    Returns:
        Tensor: (B, C, H, W), with the data type and layout of the values.

    Raises:
        ValueError: If the values are in double precision, or differ in shape
            or device.
    """
    attn, values, form = _prepare(attn, values)
    out = torch.empty_like(values[0])
    grid, sizes = _launch('forward', attn, out, form)
    table = _addresses(values, out.device)
    with torch.cuda.device_of(out):  # where Triton launches
        _forward_kernel[grid](attn, table, out, len(values), **sizes)
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
    dtype = attn.dtype
    attn, values, form = _prepare(attn, values)
    grad = _aligned(grad.to(values[0].dtype), form)
    grad_values = [
        torch.empty_like(value) if need else None
        for value, need in zip(values, needs_values)
    ]
    grid, sizes = _launch('backward', attn, grad, form)
    parts = (grid[1], *attn.shape) if needs_attn else (1,)
    dots = torch.empty(parts, dtype=torch.float32, device=grad.device)
    tables = [_addresses(tensors, grad.device) for tensors in (values, grad_values)]
    with torch.cuda.device_of(grad):
        _backward_kernel[grid](
            grad, attn, *tables, dots, len(values), NEEDS_ATTN=needs_attn, **sizes
        )
    return dots.sum(0).to(dtype) if needs_attn else None, grad_values


def _memory_format(value: Tensor) -> torch.memory_format:
    if value.is_contiguous():
        return torch.contiguous_format
    if value.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _aligned(value: Tensor, form: torch.memory_format) -> Tensor:
    value = value.contiguous(memory_format=form)
    return value if value.data_ptr() % 16 == 0 else value.clone()


def _prepare(attn: Tensor, values: Sequence[Tensor]):
    if values[0].dtype == torch.float64:
        raise ValueError(
            "backend='triton' sums in single precision and takes "
            'no torch.float64; allowed are torch.float16, '
            'torch.bfloat16 and torch.float32'
        )
    first = values[0]
    for value in values[1:]:  # a kernel would read beside the value
        if value.shape != first.shape or value.device != first.device:
            raise ValueError(
                f'values of one shape on one device are summed, not {first.shape} on '
                f'{first.device} and {value.shape} on {value.device}'
            )
    form = _memory_format(first)
    return (
        attn.contiguous(),
        [_aligned(value.to(first.dtype), form) for value in values],
        form,
    )


def _addresses(tensors: Sequence[Optional[Tensor]], device: torch.device) -> Tensor:
    """Addresses of tensors, on their device; 0 stands for None."""
    table = torch.tensor([0 if t is None else t.data_ptr() for t in tensors])
    return table.to(device, non_blocking=True)


@lru_cache(maxsize=None)
def gpu_name(device: torch.device) -> str:
    """Name of a GPU as in ``BLOCKS``; ``'default'`` is no GPU.

    Args:
        device (torch.device): The device.

    Returns:
        str: The name.
    """
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else 'default'


def blocks_key(kernel: str, form: torch.memory_format, itemsize: int) -> str:
    """Key in the blocks of a GPU in ``BLOCKS``.

    Args:
        kernel (str): ``'forward'`` or ``'backward'``.
        form (torch.memory_format): Layout of the values.
        itemsize (int): Bytes of an element.

    Returns:
        str: The key.
    """
    layout = 'channels_last' if form == torch.channels_last else 'contiguous'
    return f'{kernel}, {layout}, {itemsize} bytes'


def _launch(kernel: str, attn: Tensor, value: Tensor, form: torch.memory_format):
    """Grid of programs, and the sizes that each kernel takes."""
    batch, heads, _ = attn.shape
    channels, size = value.size(1), value.size(2) * value.size(3)
    head_dim = channels // heads
    chosen = BLOCKS.get(gpu_name(value.device), {}).get(
        blocks_key(kernel, form, value.element_size()), BLOCKS['default']
    )
    block = chosen['block']
    sizes = dict(
        size=size,
        channels=channels,
        HEAD_DIM=head_dim,
        CHANNELS_LAST=form == torch.channels_last,
        BLOCK=block,
        num_warps=chosen['warps'],
    )
    return (batch * heads, triton.cdiv(head_dim * size, block)), sizes
