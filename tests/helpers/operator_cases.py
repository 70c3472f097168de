"""Compare mmela's operators for mmcv with compiled ones on the same random input."""

import contextlib
import math
import sys
from importlib import import_module
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from mmela.compat import mmcv_ext

Call = Callable[[], List[Tensor]]


@contextlib.contextmanager
def provided_operators() -> Iterator[None]:
    """Make mmcv.ops use mmela's operators, even if mmcv is compiled."""
    import_module('mmcv.ops')
    before = {
        module: module.ext_module
        for name, module in list(sys.modules.items())
        if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module')
    }
    for module in before:
        module.ext_module = mmcv_ext
    try:
        yield
    finally:
        for module, operators in before.items():
            module.ext_module = operators


class Random:
    """Random input, with edge cases.

    Args:
        seed (int): Seed.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *options):
        """Choose one of the options."""
        return options[torch.randint(len(options), (), generator=self.generator)]

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def boxes(self, number: int, size: float, rounded: bool) -> Tensor:
        """Boxes (N, 4), some outside the image; rounded ones may be equal or empty."""
        corners = (self.uniform(number, 2) * 1.2 - 0.1) * size
        sides = self.uniform(number, 2) ** 2 * size
        boxes = torch.cat([corners, corners + sides], 1)
        if rounded:  # makes many IoUs and bin sizes round numbers
            boxes = (boxes / size * 10).round() * size / 10
        return boxes


def _with_gradients(call: Callable, *inputs: Optional[Tensor]) -> List[Tensor]:
    """Output, and gradients for the inputs that are not None."""
    inputs = [x if x is None else x.clone().requires_grad_() for x in inputs]
    output = call(*inputs)
    direction = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    wanted = [x for x in inputs if x is not None]
    return [output, *torch.autograd.grad(output, wanted, direction)]


def _nms_input(random: Random) -> Tuple[Tensor, Tensor, float]:
    number = random.pick(0, 1, 2, 40, 300, 2000)
    size = random.pick(10, 100, 500)
    boxes = random.boxes(number, size, rounded=random.pick(True, False))
    scores = random.uniform(number)
    if random.pick(True, False):  # equal scores
        scores = (scores * 10).round() / 10
    return boxes, scores, random.pick(0.3, 0.6, 0.7, 0.5)


def nms(random: Random) -> Call:
    from mmcv.ops import nms

    boxes, scores, threshold = _nms_input(random)
    options = dict(
        offset=random.pick(1, 0),
        score_threshold=random.pick(0.3, 0),
        max_num=random.pick(5, -1),
    )
    return lambda: list(nms(boxes, scores, threshold, **options))


def soft_nms(random: Random) -> Call:
    from mmcv.ops import soft_nms

    boxes, scores, threshold = _nms_input(random)
    boxes[:, 2:] += 0.01  # compiled scores of boxes without area are NaN
    options = dict(
        method=random.pick('naive', 'gaussian', 'linear'),
        offset=random.pick(1, 0),
        min_score=random.pick(0.3, 0.05, 1e-3),
        sigma=random.pick(0.1, 0.5),
    )
    return lambda: list(soft_nms(boxes, scores, threshold, **options))


def nms_match(random: Random) -> Call:
    from mmcv.ops import nms_match

    boxes, scores, threshold = _nms_input(random)
    dets = torch.cat([boxes, scores[:, None]], 1)
    return lambda: nms_match(dets, threshold)


def _roi_align(random: Random, mode: str, dtype: torch.dtype) -> Call:
    from mmcv.ops import roi_align

    images, channels = random.pick(1, 3, 2), random.pick(1, 3, 256)
    size = random.pick((1, 1), (7, 12), (50, 84))
    number = random.pick(0, 1, 20, 512)
    scale = random.pick(1.0, 0.25)
    rounded = mode == 'avg' and random.pick(True, False)
    boxes = random.boxes(number, max(size) / scale, rounded)
    index = (random.uniform(number, 1) * images).floor()
    rois = torch.cat([index, boxes], 1).to(dtype)
    output = random.pick(1, (2, 5), 7)
    # In float64, compiled mmcv rounds to float32 before it adapts the number of
    # samples to a box. max does not support an adaptive number.
    adapt = mode == 'avg' and dtype == torch.float32
    ratio = random.pick(1, 3, 2, *[0] * adapt)
    aligned = random.pick(False, True)
    features = random.normal(images, channels, *size, dtype=dtype)

    def call(features: Tensor) -> Tensor:
        return roi_align(features, rois, output, scale, ratio, mode, aligned)

    return lambda: _with_gradients(call, features)


def roi_align(random: Random) -> Call:
    return _roi_align(random, 'avg', random.pick(torch.float64, torch.float32))


def roi_align_max(random: Random) -> Call:
    # In float32, rounding decides which of nearly equal samples is the maximum and
    # gets the gradient. It also decides whether a sample on a border is inside.
    return _roi_align(random, 'max', torch.float64)


def _convolution(random: Random) -> Tuple[dict, Dict[str, Tensor]]:
    dtype = random.pick(torch.float64, torch.float32)
    groups, deform_groups = random.pick(1, 2, 1), random.pick(1, 2, 1)
    kernel = random.pick((1, 1), (3, 2), (3, 3))
    step = dict(
        stride=random.pick(2, (1, 2), 1),
        padding=random.pick(0, (2, 1), 1),
        dilation=random.pick((1, 2), 1),
    )
    images, channels = random.pick(1, 3, 2), random.pick(2, 4, 128)
    height, width = random.pick((8, 6), (11, 9), (40, 40))
    features = random.normal(images, channels, height, width, dtype=dtype)
    weight = random.normal(channels, channels // groups, *kernel, dtype=dtype)
    like = torch.nn.functional.conv2d(features, weight, groups=groups, **step)
    points = deform_groups * kernel[0] * kernel[1]
    offset = random.normal(images, 2 * points, *like.shape[2:], dtype=dtype) * 2
    # Sample between pixels. On a pixel the gradient jumps, and rounding decides.
    offset = (offset * 10).round() / 10 + 0.05
    mask = random.uniform(images, points, *like.shape[2:], dtype=dtype)
    bias = random.normal(channels, dtype=dtype)
    step.update(groups=groups, deform_groups=deform_groups)
    return step, dict(
        features=features, offset=offset, weight=weight, mask=mask, bias=bias
    )


def deform_conv(random: Random) -> Call:
    from mmcv.ops import deform_conv2d

    step, tensors = _convolution(random)
    inputs = [tensors[name] for name in ('features', 'offset', 'weight')]

    def call(*inputs: Tensor) -> Tensor:
        return deform_conv2d(*inputs, *step.values())

    return lambda: _with_gradients(call, *inputs)


def modulated_deform_conv(random: Random) -> Call:
    from mmcv.ops import modulated_deform_conv2d

    step, tensors = _convolution(random)
    if random.pick(True, False):
        tensors['bias'] = None
    inputs = [
        tensors[name] for name in ('features', 'offset', 'mask', 'weight', 'bias')
    ]

    def call(*inputs: Optional[Tensor]) -> Tensor:
        return modulated_deform_conv2d(*inputs, *step.values())

    return lambda: _with_gradients(call, *inputs)


OPERATORS = {
    function.__name__: function
    for function in (
        nms,
        soft_nms,
        nms_match,
        roi_align,
        roi_align_max,
        deform_conv,
        modulated_deform_conv,
    )
}


def difference(name: str, seed: int) -> Tuple[float, torch.dtype]:
    """Compare one case.

    Args:
        name (str): One of ``OPERATORS``.
        seed (int): Seed of the random input.

    Returns:
        tuple[float, torch.dtype]: Largest difference of an output or gradient
        relative to its largest value, or to 1 if that is smaller; infinite if
        shapes or integers differ. Second, the data type of the computation,
        float64 or float32.
    """
    call = OPERATORS[name](Random(seed))
    expected = call()
    with provided_operators():
        actual = call()
    double = any(x.dtype == torch.float64 for x in expected)
    gaps = [_gap(*pair) for pair in zip(actual, expected)]
    if len(actual) != len(expected):
        gaps.append(math.inf)
    return max(gaps, default=0.0), torch.float64 if double else torch.float32


def _gap(actual: Tensor, expected: Tensor) -> float:
    same = actual.shape == expected.shape and actual.dtype == expected.dtype
    if same and torch.equal(actual, expected):
        return 0.0
    if not same or not expected.is_floating_point():
        return math.inf
    actual, expected = actual.detach().double(), expected.detach().double()
    gap = float((actual - expected).abs().max()) / max(1, float(expected.abs().max()))
    return math.inf if math.isnan(gap) else gap
