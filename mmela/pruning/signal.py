"""Whether divergences say anything about the data."""

from typing import Optional, Sequence

import numpy as np

from .divergence import Divergence

MIN_DEVIATION = 0.25
MIN_MOVEMENT = 0.4


def deviation(divergences: Sequence[Optional[Divergence]]) -> Optional[float]:
    """How far divergences are from those of uniform attention.

    Attention that has learned nothing is uniform where its scores are small,
    and its divergence is then the baseline ``log((t + n) / t)``. From one
    block to the next that changes by 41, 29, 22 and 18 % in a stage of six: a
    deviation below a quarter (:data:`MIN_DEVIATION`) leaves the order to the
    positions. The median is taken as a single attention that has learned tells
    nothing of those that a policy prunes. Where both attend over the same tokens
    the baseline is 0, and nothing is known.

    Args:
        divergences (Sequence[Divergence | None]): Of the attentions of a
            network; None where it is not measured.

    Returns:
        float | None: Median of ``abs(total / baseline - 1)``; None without a
        measured divergence that has a baseline.
    """
    found = [abs(d.total / d.baseline - 1) for d in divergences if d and d.more]
    return float(np.median(found)) if found else None


def has_learned(
    deviation: Optional[float], movement: Optional[float]
) -> Optional[bool]:
    """Whether a decision depends on what attentions have learned.

    Args:
        deviation (float | None): Of :func:`deviation`. Below
            :data:`MIN_DEVIATION` the position decides.
        movement (float | None): How far query and key have come from their
            random start, relative to it; None where that is not known, which
            is no objection. Below :data:`MIN_MOVEMENT` the random start
            decides, which is far from uniform too on large features: of the
            product of query and key, ``(1 + m)**2`` times that of the start,
            learning has then brought less than one half (``m < 2**0.5 - 1``).

    Returns:
        bool | None: None if nothing is measured.
    """
    if deviation is None:
        return None
    still = movement is not None and movement < MIN_MOVEMENT
    return deviation >= MIN_DEVIATION and not still


def learning_state(deviation: Optional[float], movement: Optional[float]) -> str:
    """Say why :func:`has_learned` is False.

    Args:
        deviation (float | None): See :func:`has_learned`.
        movement (float | None): See :func:`has_learned`.

    Returns:
        str: A sentence without its full stop.
    """
    found = []
    if deviation is not None and deviation < MIN_DEVIATION:
        found.append(
            f'their divergences are within {deviation:.0%} of those of uniform '
            f'attention, and less than {MIN_DEVIATION:.0%} says nothing: what is '
            'pruned depends on the position or on chance'
        )
    if movement is not None and movement < MIN_MOVEMENT:
        found.append(
            f'query and key have moved by {movement:.1%} from their random start, '
            f'and up to {MIN_MOVEMENT:.0%} what is pruned depends on that'
        )
    return (
        f'The layer attentions have not learned yet: {"; ".join(found)}. What helps: '
        'later windows, put_off_until, a larger learning rate of query and key'
    )
