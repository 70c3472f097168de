"""A replacement for ``mmcv._ext``, the compiled module of ``mmcv.ops``.

:mod:`mmela_light.operators` loads this file as ``mmcv._ext`` if mmcv is installed
without compiled operators (``mmcv-lite``). It needs only torch, torchvision and numpy,
so a copy in mmcv's folder works by itself.

Functions have the names and arguments of the compiled ones. Most write their results
into tensors that ``mmcv.ops`` allocates and return nothing. Half precision is computed
in float32. Every other operator exists too, because ``mmcv.ops`` checks the names on
import, but raises an error when called.
"""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor


def __getattr__(name: str) -> Callable:
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def operator(*args, **kwargs):
        _refuse(name)

    return operator


def _refuse(name: str) -> None:
    raise NotImplementedError(
        f'mmcv operator {name} needs a compiled mmcv; mmela does not replace it. '
        'Compile mmcv with: MMELA_MMCV=compiled bash tools/setup.sh. Or install a '
        'prebuilt wheel with: pip uninstall mmcv-lite; pip install openmim; '
        'pip install "setuptools>=77.0.3,<81"; mim install "mmcv<2.2.0"'
    )


def get_compiler_version() -> str:
    """Entry for the compiler in mmcv's description of the environment."""
    return f'none: operators of torchvision {torchvision.__version__}'


def get_compiling_cuda_version() -> str:
    """Entry for the CUDA version there."""
    return get_compiler_version()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes (Tensor): Corners x1, y1, x2, y2 of shape (N, 4).
        scores (Tensor): Scores of shape (N,).
        iou_threshold (float): Drop a box if its IoU with a better one exceeds this.
        offset (int): A box is ``x2 - x1 + offset`` wide: 0 or 1.

    Returns:
        Tensor: Indices of the kept boxes, best first, of shape (K,), int64.
    """
    boxes = _widen(boxes)
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # Compiled mmcv compares in float32, where an IoU of 0.6 does not exceed 0.6
    threshold = float(np.float32(iou_threshold))
    # Equal scores keep the order of torch's sort, as in compiled mmcv
    scores, order = scores.to(boxes).sort(descending=True)
    return order[torchvision.ops.nms(boxes[order], scores, threshold)]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression, on the CPU as in compiled mmcv.

    Args:
        boxes (Tensor): Corners of shape (N, 4).
        scores (Tensor): Scores of shape (N,).
        dets (Tensor): Output; its first rows get the K kept boxes with their new
            scores; shape (N, 5).
        iou_threshold (float): Reduce scores from this IoU on (methods 0, 1).
        sigma (float): Width of the Gaussian (method 2).
        min_score (float): Drop boxes whose score falls below this.
        method (int): 0 naive, 1 linear, 2 Gaussian.
        offset (int): A box is ``x2 - x1 + offset`` wide: 0 or 1.

    Returns:
        Tensor: Indices of the kept boxes, of shape (K,), int64.
    """
    # Rows x1, y1, x2, y2, score; a column is a box.
    table = torch.cat([boxes, scores[:, None]], 1).float().t().contiguous().numpy()
    order = np.arange(len(boxes))
    start = 0
    while start < len(order):
        best = start + table[4, start:].argmax()
        for array in (table, order):
            array[..., [start, best]] = array[..., [best, start]]
        start += 1
        rest = table[:, start:]
        iou = _iou(table[:, start - 1], rest, offset)
        if method == 2:
            # numpy's float32 exp is less accurate than that of compiled mmcv
            decay = np.exp((-(iou * iou) / sigma).astype(np.float64))
            rest[4] *= decay.astype(np.float32)
        else:
            rest[4] *= np.where(iou >= iou_threshold, method * (1 - iou), 1)
        # Equal scores stay in the order of the compiled loop, which replaces a
        # dropped box with the last one.
        kept = rest[4] >= min_score
        end = start + np.count_nonzero(kept)
        gaps = start + np.flatnonzero(~kept[: end - start])
        last = end + np.flatnonzero(kept[end - start :])[::-1]
        for array in (table, order):
            array[..., gaps] = array[..., last]
        table, order = table[:, :end], order[:end]
    dets[: len(order)] = torch.from_numpy(table.T)
    return torch.from_numpy(order)


def nms_match(dets: Tensor, iou_threshold: float) -> List[List[int]]:
    """Non-maximum suppression that reports which box suppresses which.

    Args:
        dets (Tensor): Boxes and scores of shape (N, 5), on the CPU.
        iou_threshold (float): Drop a box from this IoU on.

    Returns:
        list[list[int]]: For each kept box, best first, its index and the indices of
        the boxes that it suppresses.
    """
    table = dets.float().t().contiguous().numpy()
    rest = dets[:, 4].sort(descending=True)[1].numpy()
    groups = []
    while len(rest):
        best, rest = rest[0], rest[1:]
        same = _iou(table[:, best], table[:, rest]) >= iou_threshold
        groups.append([int(best), *rest[same].tolist()])
        rest = rest[~same]
    return groups


def _iou(box: np.ndarray, boxes: np.ndarray, offset: int = 0) -> np.ndarray:
    """IoU of a box, (>= 4,), with boxes, (>= 4, N); shape (N,)."""
    width = np.minimum(box[2], boxes[2]) - np.maximum(box[0], boxes[0]) + offset
    height = np.minimum(box[3], boxes[3]) - np.maximum(box[1], boxes[1]) + offset
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    first, areas = (
        (corners[2] - corners[0] + offset) * (corners[3] - corners[1] + offset)
        for corners in (box, boxes)
    )
    union = first + areas - shared
    # Boxes without area overlap nothing: 0 / 0 is 0
    return np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign.

    Args:
        input (Tensor): Features of shape (B, C, H, W).
        rois (Tensor): Index of the image and corners, shape (N, 5).
        output (Tensor): Output, shape (N, C, h, w).
        argmax_y (Tensor): Output of maximum pooling: the row of the maximum among
            the samples, shape (N, C, h, w).
        argmax_x (Tensor): The same for the column.
        aligned_height (int): h.
        aligned_width (int): w.
        spatial_scale (float): Features per pixel.
        sampling_ratio (int): Samples per bin and axis; 0 adapts them to the box.
        pool_mode (int): 0 maximum, 1 average.
        aligned (bool): Whether to shift by half a pixel.

    Raises:
        NotImplementedError: For maximum pooling with ``sampling_ratio=0``.
    """
    parts, samples = _samples(pool_mode, sampling_ratio)
    size = aligned_height * parts, aligned_width * parts
    input = _widen(input)
    bins = torchvision.ops.roi_align(
        input, rois.to(input), size, spatial_scale, samples, aligned
    )
    if pool_mode == 1:
        output.copy_(bins)
        return
    maximum, position = F.max_pool2d(bins, parts, return_indices=True)
    output.copy_(maximum)
    argmax_y.copy_(position // size[1])
    argmax_x.copy_(position % size[1])


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward`, written into ``grad_input``."""
    parts, samples = _samples(pool_mode, sampling_ratio)
    size = aligned_height * parts, aligned_width * parts
    grad = _widen(grad_output)
    if pool_mode == 0:
        position = argmax_y.long() * size[1] + argmax_x.long()
        grad = F.max_unpool2d(grad, position, parts, output_size=size)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad,
            rois.to(grad),
            spatial_scale,
            *size,
            *grad_input.shape,
            samples,
            aligned,
        )
    )


def _samples(pool_mode: int, sampling_ratio: int) -> Tuple[int, int]:
    """Number of parts per bin, and of samples to average in each part.

    torchvision can only average. The maximum over s x s samples of a bin is the
    maximum over s x s parts with one sample each.
    """
    if pool_mode == 1:
        return 1, sampling_ratio
    if sampling_ratio <= 0:
        _refuse("roi_align with pool_mode='max' and sampling_ratio=0")
    return sampling_ratio, 1


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Focal loss of each score.

    Args:
        input (Tensor): Logits of shape (N, C).
        target (Tensor): Classes of shape (N,), int64; C is the background.
        weight (Tensor): Weights of the classes of shape (C,), or empty.
        output (Tensor): Output: the loss, shape (N, C).
        gamma (float): Focusing parameter.
        alpha (float): Weight of the positive class.
    """
    output.copy_(_focal_loss(_widen(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Derivative of each loss with respect to its logit, written to ``grad_input``."""

    def loss(logits: Tensor) -> Tensor:
        return _focal_loss(logits, target, weight, gamma, alpha).sum()

    grad_input.copy_(*_gradients(loss, [_widen(input)]))


def _focal_loss(
    logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    classes = torch.arange(logits.size(1), device=logits.device)
    labels = (target[:, None] == classes).to(logits)
    loss = torchvision.ops.sigmoid_focal_loss(logits, labels, alpha, gamma)
    return loss * weight[target][:, None] if weight.numel() else loss


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **size: int,
) -> None:
    """Deformable convolution, version 1 (without modulation).

    Args:
        input (Tensor): Features of shape (B, C, H, W).
        weight (Tensor): Kernels of shape (O, C / groups, kH, kW).
        offset (Tensor): Offsets y and x of each kernel element from the regular grid,
            shape (B, 2 * D * kH * kW, h, w) for D deformable groups.
        output (Tensor): Output, shape (B, O, h, w).
        columns (Tensor): Not used.
        ones (Tensor): Not used.
        **size (int): Stride ``dH, dW``, padding ``padH, padW``,
            ``dilationH, dilationW``, ``group`` and ``deformable_group``. The
            rest is not used.
    """
    arguments = _arguments(input, weight, offset, None, None, size)
    output.copy_(torch.ops.torchvision.deform_conv2d(*arguments))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **size: int,
) -> None:
    """Gradients of :func:`deform_conv_forward` with respect to input and offset.

    They are written to ``gradInput`` and ``gradOffset``. torchvision computes all
    gradients at once, so the gradient of the weight, which mmcv requests next, is
    stored in ``columns``, a buffer that both calls get.
    """
    arguments = _arguments(input, weight, offset, None, None, size)
    grads = _deform_conv_backward(gradOutput, arguments)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])
    columns.resize_(weight.shape).copy_(grads[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **size: int,
) -> None:
    """Gradient of the weight times ``scale``, written to ``gradWeight``."""
    if columns.shape != gradWeight.shape:  # input and offset need no gradient
        # The gradient of the weight does not depend on the weight
        arguments = _arguments(input, gradWeight, offset, None, None, size)
        columns = _deform_conv_backward(gradOutput, arguments)[1]
    gradWeight.copy_(scale * columns)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **size: int,
) -> None:
    """Deformable convolution, version 2 (with modulation).

    Args:
        input (Tensor): See :func:`deform_conv_forward`.
        weight (Tensor): See :func:`deform_conv_forward`.
        bias (Tensor): Bias of shape (O,), used only with ``with_bias``.
        ones (Tensor): Not used.
        offset (Tensor): See :func:`deform_conv_forward`.
        mask (Tensor): Factor of each sample, shape (B, D * kH * kW, h, w).
        output (Tensor): Output, shape (B, O, h, w).
        columns (Tensor): Not used.
        with_bias (bool): Whether there is a bias.
        **size (int): ``stride_h, stride_w, pad_h, pad_w, dilation_h,
            dilation_w, group, deformable_group``. The rest is not used.
    """
    bias = bias if with_bias else None
    arguments = _arguments(input, weight, offset, mask, bias, size)
    output.copy_(torch.ops.torchvision.deform_conv2d(*arguments))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **size: int,
) -> None:
    """Gradients of the above, written into the tensors called ``grad_...``."""
    arguments = _arguments(input, weight, offset, mask, None, size)
    grads = _deform_conv_backward(grad_output, arguments)
    outputs = [grad_input, grad_weight, grad_offset, grad_mask]
    if with_bias:
        outputs.append(grad_bias)
    for output, grad in zip(outputs, grads):
        output.copy_(grad)


def _arguments(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Optional[Tensor],
    bias: Optional[Tensor],
    size: Dict[str, int],
) -> list:
    """Arguments for torchvision's deformable convolution."""
    input = _widen(input)
    steps = [
        size[first if first in size else second]
        for first, second in (
            ('dH', 'stride_h'),
            ('dW', 'stride_w'),
            ('padH', 'pad_h'),
            ('padW', 'pad_w'),
            ('dilationH', 'dilation_h'),
            ('dilationW', 'dilation_w'),
        )
    ]
    return [
        input,
        weight.to(input),
        offset.to(input),
        input.new_zeros(len(input), 1) if mask is None else mask.to(input),
        input.new_zeros(len(weight)) if bias is None else bias.to(input),
        *steps,
        size['group'],
        size['deformable_group'],
        mask is not None,
    ]


def _deform_conv_backward(grad_output: Tensor, arguments: list) -> Tuple[Tensor, ...]:
    """Gradients of input, weight, offset, mask and bias."""
    grad_output = grad_output.to(arguments[0])
    return torch.ops.torchvision._deform_conv2d_backward(grad_output, *arguments)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention with mmcv's PyTorch code.

    mmcv calls this function only on CUDA, and its PyTorch code elsewhere.

    Args:
        value (Tensor): Values of shape (B, K, heads, channels).
        value_spatial_shapes (Tensor): Height and width of each level, (L, 2).
        value_level_start_index (Tensor): Not used.
        sampling_locations (Tensor): x and y in [0, 1] of each sample, shape
            (B, Q, heads, L, P, 2).
        attention_weights (Tensor): Shape (B, Q, heads, L, P).
        im2col_step (int): Not used.

    Returns:
        Tensor: Shape (B, Q, heads * channels).
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights
    )


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of the above, written into the tensors called ``grad_...``."""

    def weighted_sum(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        output = ms_deform_attn_forward(
            values,
            value_spatial_shapes,
            value_level_start_index,
            locations,
            weights,
            im2col_step,
        )
        return (output * grad_output).sum()

    inputs = value, sampling_locations, attention_weights
    grads = _gradients(weighted_sum, inputs)
    for output, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        output.copy_(grad)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Columns of a convolution at selected positions.

    Args:
        im (Tensor): Features of shape (1, C, H, W).
        mask_h_idx (Tensor): Rows of the M positions in the output.
        mask_w_idx (Tensor): Columns of these positions.
        col (Tensor): Output, shape (C * kernel_h * kernel_w, M).
        kernel_h (int): Height of the kernel.
        kernel_w (int): Width of the kernel.
        pad_h (int): Rows of padding above and below.
        pad_w (int): Columns of padding left and right.
    """
    columns = F.unfold(im, (kernel_h, kernel_w), padding=(pad_h, pad_w))[0]
    width = im.size(3) + 2 * pad_w - kernel_w + 1
    col.copy_(columns[:, mask_h_idx * width + mask_w_idx])


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write ``col`` (C, M) to M positions of ``im`` (1, C, height, width)."""
    im[0, :, mask_h_idx, mask_w_idx] = col


def _widen(tensor: Tensor) -> Tensor:
    """Convert to float32 or float64, since torchvision lacks some half operators."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> Tuple[Tensor, ...]:
    """Gradients of a scalar function with respect to its inputs."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*inputs), inputs)
