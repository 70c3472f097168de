"""What is left of a layer attention, and how a checkpoint holds it."""

from enum import IntEnum
from typing import Tuple

import torch
from torch import Tensor


class AttentionState(IntEnum):
    """What is left of a layer attention."""

    ACTIVE = 0
    """Nothing is pruned."""
    VALUE_ONLY = 1
    """Retrieves nothing, but later layers still see its key and value."""
    PRUNED = 2
    """Removed whole: its block is a plain residual block."""


# Floating-point numbers, which averages and casts treat as they treat weights. The
# sign tells them apart: an average of an active and a pruned one is positive, as that
# of a pruned one is, whatever the weights.
CODES = {
    AttentionState.ACTIVE: 0.0,
    AttentionState.VALUE_ONLY: -1.25,
    AttentionState.PRUNED: 2.0,
}
# What a running average may have lost by rounding
TOLERANCE = 1e-3


def encode(state: AttentionState) -> float:
    """The number that a buffer or a checkpoint holds for a state.

    Args:
        state (AttentionState): The state.

    Returns:
        float: 0 for ``ACTIVE``, -1.25 for ``VALUE_ONLY``, 2 for ``PRUNED``.
    """
    return CODES[AttentionState(state)]


def decode(value: Tensor) -> Tuple[AttentionState, bool]:
    """The state that a buffer or a checkpoint holds.

    An average of networks whose states differ lies between the codes. What one of
    them has pruned is taken as pruned, or as reduced to its value, since pruning is not
    undone.

    Args:
        value (Tensor): One number: a code of :func:`encode`, or an integer of
            :class:`AttentionState`, which earlier versions wrote.

    Returns:
        tuple[AttentionState, bool]: The state, and whether the number was exact
        and not an average of several states.

    Raises:
        ValueError: If it is neither a state nor between two of them.
    """
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f'a state of shape {tuple(value.shape)} is not one number')
    number = float(value)
    low, high = CODES[AttentionState.VALUE_ONLY], CODES[AttentionState.PRUNED]
    if not value.is_floating_point():
        if number in (0, 1, 2):
            return AttentionState(int(number)), True
    elif low - TOLERANCE <= number <= high + TOLERANCE:
        if number == 0:
            return AttentionState.ACTIVE, True
        if number < 0:
            return AttentionState.VALUE_ONLY, number - low <= TOLERANCE
        return AttentionState.PRUNED, high - number <= TOLERANCE
    raise ValueError(
        f'state {number:g} is unknown; allowed are {CODES[AttentionState.ACTIVE]:g} '
        f'(active), {low:g} (value only) and {high:g} (pruned)'
    )


def encode_text(text: str) -> Tensor:
    """Text as a tensor, (N,), in single precision, which a float16 holds too."""
    return torch.tensor(list(text.encode()), dtype=torch.float32)


def decode_text(codes: Tensor) -> str:
    """The text of :func:`encode_text`, after casts and averages too."""
    numbers = codes.detach().float().round().clamp(0, 255).to(torch.uint8)
    return bytes(numbers.flatten().tolist()).decode(errors='replace')
