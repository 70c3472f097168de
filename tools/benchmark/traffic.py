"""Least memory traffic of the weighted sums, and the bandwidth of the machine.

A weighted sum is bound by memory: a multiplication and an addition per element
read. So the least time that it can take is the bytes it has to move over the
bandwidth. Of a sum over ``t`` values of ``N = B * C * H * W`` elements, one pass

- forward reads ``t N`` and writes ``N``,
- backward reads the gradient of the output and ``t N``, and writes ``t N``.

Adding up the gradients of a value that several blocks see is not in it.
"""

from functools import partial
from statistics import median
from time import perf_counter
from typing import Callable, List

import torch
from torch import Tensor, nn

from mmela.structure import attention_stages

from .common import synchronize


def sum_traffic(model: nn.Module, forward: Callable[[], object], itemsize: int) -> int:
    """Bytes that the weighted sums of a network have to move in one step.

    Args:
        model (nn.Module): The network.
        forward (callable): Runs it once, as the step does. Where it runs
            without gradients, nothing is counted for the backward pass.
        itemsize (int): Bytes of an element.

    Returns:
        int: The bytes; 0 where no attention weighs layers (the bare network,
        MRLA-light, KCLA).
    """
    total = 0

    def count(scores: List[Tensor], stage: nn.Module, args: tuple, output: Tensor):
        nonlocal total
        size = output.numel() * itemsize
        for t in (score.size(-1) for score in scores):
            total += (t + 1 + output.requires_grad * (2 * t + 1)) * size

    handles = []
    stages = attention_stages(model).values()
    for stage in stages:
        scores: List[Tensor] = []
        stage.observer = scores.extend
        handles.append(stage.register_forward_hook(partial(count, scores)))
    try:
        forward()
    finally:
        for stage, handle in zip(stages, handles):
            stage.observer = None
            handle.remove()
    return total


def copy_bandwidth(device: torch.device, size: int, repeats: int = 5) -> float:
    """Measure the memory bandwidth by copies too large for any cache.

    Args:
        device (torch.device): The device.
        size (int): Bytes of the copy.
        repeats (int): Copies, of which the median counts. Defaults to 5.

    Returns:
        float: Bytes per second, read and written bytes both counted.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(perf_counter() - start)
    return 2 * size / median(times[1:])
