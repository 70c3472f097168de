"""Memory traffic of layer attention, and the bandwidth of the machine.

Retrieving from values is bound by memory: a multiplication and an addition
per element read. So the least time that it can take is the bytes it has to
move over the bandwidth.

A block retrieves from ``t`` values of ``N = B * C * H * W`` elements each.
Counted are reads and writes of tensors of that size, in units of ``N``
elements:

=============  =========  ============  =====================================
form           forward    backward      of that
=============  =========  ============  =====================================
one pass       t + 1      2t + 1        forward: t values, 1 output.
                                        Backward: gradient of the output once,
                                        t values, t gradients
shared values  t + 1      2t + 1 + n    backward: gradient of the output once
                                        and t values for the weights; once
                                        more for the gradient of each value.
                                        n new values get their gradient, 1
                                        unless a block keeps its value alone
published      5t + 1     4t + 2        forward: the concatenation and the
                                        change to heads read and write t each.
                                        Backward: the two products read the
                                        gradient of the output each, the t
                                        gradients are copied back from heads.
                                        For t = 1, 2 and 4: no copies
=============  =========  ============  =====================================

In the published form the gradients of a value that several blocks have seen
are added up: each addition reads two and writes one. A block adds to the
gradients of the values that blocks before it have seen, t - 1 where nothing is
pruned. MRLA-base here shares its values instead, see
:func:`mmela.ops.share_value`; MLA has values of its own in each block.

MRLA-light sums two weighted tensors, its value and what came before, so
``t = 2``. So does KCLA for its running mean, and weighs the value by heads in
a pass of its own, ``t = 1``.

For what does not depend on ``t`` there is no term: pooling, query, key, the
value convolution, normalization and the residual addition.
"""

from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Callable, Dict, Iterator, List, Tuple

import torch
from common import synchronize
from published_form import PublishedMRLABase
from torch import nn

from mmela.layers import KCLA, MLA, AttentionState, LayerAttention, MRLALight
from mmela.structure import attention_stages


@dataclass
class Traffic:
    """Bytes read and written.

    Attributes:
        forward (int): In the forward pass.
        backward (int): In the backward pass.
        accumulation (int): In adding up gradients of the same value.
    """

    forward: int = 0
    backward: int = 0
    accumulation: int = 0

    @property
    def total(self) -> int:
        """int: All bytes."""
        return self.forward + self.backward + self.accumulation

    def __add__(self, other: 'Traffic') -> 'Traffic':
        return Traffic(
            self.forward + other.forward,
            self.backward + other.backward,
            self.accumulation + other.accumulation,
        )

    def to_dict(self) -> Dict[str, int]:
        """dict[str, int]: The attributes and ``total``."""
        return dict(asdict(self), total=self.total)


def retrieval_traffic(
    tokens: int,
    accumulations: int,
    size: int,
    published: bool = False,
    backward: bool = True,
    new: int = 0,
) -> Traffic:
    """Bytes that one block's retrieval moves.

    Args:
        tokens (int): Values ``t`` that the block sees.
        accumulations (int): How many of their gradients are added to others.
        size (int): Bytes of one value.
        published (bool): The form with copies. Defaults to False.
        backward (bool): Whether a backward pass follows. Defaults to True.
        new (int): Shared values that no block before has seen. Defaults to 0,
            which means that values are not shared.

    Returns:
        Traffic: The bytes.
    """
    t = tokens
    if not published:
        forward, gradients = t + 1, 2 * t + 1 + new
    elif t > 1:
        forward, gradients = 5 * t + 1, 4 * t + 2
    else:
        forward, gradients = 2, 4
    if not backward:
        return Traffic(forward * size)
    return Traffic(forward * size, gradients * size, 3 * accumulations * size)


def retrievals(stage: nn.Module) -> Iterator[Tuple[LayerAttention, List[tuple]]]:
    """What the active attentions of a stage retrieve from.

    Args:
        stage (AttentionStage): A stage.

    Yields:
        tuple[LayerAttention, list[tuple[int, int, int]]]: An active attention
        and of each of its weighted sums the tensors that it is over, the
        gradients that are added to others, and the shared values that are new.
    """
    seen = seen_before = 0
    for attention in stage.attentions:
        seen += attention.attention_state != AttentionState.PRUNED
        if not attention.active:
            continue
        if isinstance(attention, KCLA):
            # The first of a stage has a mean only if it takes one over. The
            # block before has transformed the mean too.
            has_mean = seen_before or hasattr(attention, 'cross_stage')
            yield attention, [(2, 1, 0)] * bool(has_mean) + [(1, 0, 0)]
        elif isinstance(attention, MRLALight):
            # As literal recurrence, the first has nothing before it
            second = seen_before or attention.previous == 'identity'
            yield attention, [(2, 1, 0) if second else (1, 0, 0)]
        elif isinstance(attention, PublishedMRLABase):
            yield attention, [(seen, seen_before, 0)]
        elif isinstance(attention, MLA):
            yield attention, [(seen, 0, 0)]
        else:
            yield attention, [(seen, 0, seen - seen_before)]
        seen_before = seen


def model_traffic(
    model: nn.Module, forward: Callable[[], object], itemsize: int
) -> Traffic:
    """Bytes that the retrievals of a network move in one step.

    Args:
        model (nn.Module): The network.
        forward (callable): Runs it once, as the step does. Where it runs
            without gradients, nothing is counted for the backward pass.
        itemsize (int): Bytes of an element.

    Returns:
        Traffic: The bytes; none for a network without layer attention.
    """
    sums: Dict[LayerAttention, List[tuple]] = {}
    for stage in attention_stages(model).values():
        sums.update(retrievals(stage))
    total = Traffic()

    def count(attention, args, output) -> None:
        nonlocal total
        for tokens, accumulations, new in sums[attention]:
            total += retrieval_traffic(
                tokens,
                accumulations,
                args[0].numel() * itemsize,
                published=isinstance(attention, PublishedMRLABase),
                backward=output.requires_grad,
                new=new,
            )

    handles = [a.register_forward_hook(count) for a in sums]
    try:
        forward()
    finally:
        for handle in handles:
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
