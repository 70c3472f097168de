"""Decide whether divergences reflect what attentions have learned."""

from typing import Optional, Sequence

import numpy as np

from .divergence import Divergence

MIN_DEVIATION = 0.25
MIN_MOVEMENT = 0.4


def deviation(divergences: Sequence[Optional[Divergence]]) -> Optional[float]:
    """How far divergences are from those of uniform attention.

    Untrained attention with small scores is uniform, and its divergence is the
    baseline ``log((t + n) / t)``. In a stage of six blocks that baseline changes by
    41, 29, 22 and 18 % from one block to the next, so below a deviation of a quarter
    (:data:`MIN_DEVIATION`) the positions decide the order. The median is used because
    one attention that has learned does not vouch for those that a policy prunes. If
    both attentions have the same number of tokens, the baseline is 0 and they do not
    count.

    Args:
        divergences (Sequence[Divergence | None]): Divergences of the attentions
            of a network; None for those not measured.

    Returns:
        float | None: Median of ``abs(total / baseline - 1)``; None without a
        measured divergence that has a baseline.
    """
    relative = [abs(d.total / d.baseline - 1) for d in divergences if d and d.more]
    return float(np.median(relative)) if relative else None


def has_learned(
    deviation: Optional[float], movement: Optional[float]
) -> Optional[bool]:
    """Whether a decision depends on what attentions have learned.

    Args:
        deviation (float | None): Result of :func:`deviation`. Below
            :data:`MIN_DEVIATION` the position decides.
        movement (float | None): Relative distance of query and key from their
            random start; None if unknown, and then it is not checked. Below
            :data:`MIN_MOVEMENT` the random start decides, which can be far from
            uniform on large features: the product of query and key is then at
            most ``(1 + m)**2`` times the initial one, so learning accounts for
            less than half of it (``m < 2**0.5 - 1``).

    Returns:
        bool | None: None if nothing is measured.
    """
    if deviation is None:
        return None
    still = movement is not None and movement < MIN_MOVEMENT
    return deviation >= MIN_DEVIATION and not still


def learning_state(deviation: Optional[float], movement: Optional[float]) -> str:
    """Explain why :func:`has_learned` is False.

    Args:
        deviation (float | None): See :func:`has_learned`.
        movement (float | None): See :func:`has_learned`.

    Returns:
        str: Sentences, the last one without its full stop.
    """
    reasons = []
    if deviation is not None and deviation < MIN_DEVIATION:
        reasons.append(
            f'divergences are within {deviation:.0%} of uniform attention '
            f'({MIN_DEVIATION:.0%} needed)'
        )
    if movement is not None and movement < MIN_MOVEMENT:
        reasons.append(
            f'query and key have moved {movement:.1%} from their random start '
            f'({MIN_MOVEMENT:.0%} needed)'
        )
    return (
        'Attention has not learned yet, so this pruning is close to arbitrary: '
        f'{", and ".join(reasons)}. Use later windows, set put_off_until, or raise '
        'the learning rate of query and key'
    )
