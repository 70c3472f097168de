from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layer_weighted_sum import is_symbolic


def pool_and_convolve(x: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Global average pooling and depth-wise convolution of the same input.

    What query, key and value of a layer attention start from (MRLA, section
    4.1). The gradient of the pooling, one number per channel, is added in
    place to that of the convolution instead of taking a tensor of the input's
    size and another pass.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): Kernels of the convolution, (C, 1, 3, 3).

    Returns:
        tuple[Tensor, Tensor]: The averages (B, C), and the convolution with
        zero padding (B, C, H, W).
    """
    if is_symbolic() or not torch.is_grad_enabled() or _autocasts(x):
        return _plain(x, weight)
    return _PoolAndConvolve.apply(x, weight)


def _plain(x: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    return x.mean((2, 3)), F.conv2d(x, weight, padding=1, groups=x.size(1))


def _autocasts(x: Tensor) -> bool:
    try:
        return torch.is_autocast_enabled(x.device.type)
    except TypeError:  # before torch 2.4
        return (
            torch.is_autocast_enabled()
            if x.is_cuda
            else torch.is_autocast_cpu_enabled()
        )


class _PoolAndConvolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return _plain(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_pooled: Tensor, grad_value: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_value,
            x,
            weight,
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            x.size(1),
            [needs_x, needs_weight, False],
        )
        if needs_x:
            grad_pooled = grad_pooled / (x.size(2) * x.size(3))
            grad_x.add_(grad_pooled[..., None, None])
        return grad_x, grad_weight
