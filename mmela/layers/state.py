"""The pruning state of a layer attention, and its encoding in a checkpoint."""

from enum import IntEnum
from typing import Tuple

import torch
from torch import Tensor


class AttentionState(IntEnum):
    """The pruning state of a layer attention."""

    ACTIVE = 0
    """Nothing is pruned."""
    VALUE_ONLY = 1
    """It retrieves nothing, but later layers still see its key and value."""
    PRUNED = 2
    """It is removed: its block is a plain residual block."""


# Floating-point codes, so that averages and casts of networks treat them like
# weights. The sign decides: any average of an active and a pruned network is
# positive, like the code of the pruned one.
CODES = {
    AttentionState.ACTIVE: 0.0,
    AttentionState.VALUE_ONLY: -1.25,
    AttentionState.PRUNED: 2.0,
}
# Rounding error that a running average may have
TOLERANCE = 1e-3


def encode(state: AttentionState) -> float:
    """Encode a state as the number that a buffer or a checkpoint holds.

    Args:
        state (AttentionState): The state.

    Returns:
        float: 0 for ``ACTIVE``, -1.25 for ``VALUE_ONLY``, 2 for ``PRUNED``.
    """
    return CODES[AttentionState(state)]


def decode(value: Tensor) -> Tuple[AttentionState, bool]:
    """Decode the number that a buffer or a checkpoint holds.

    An average of networks with different states lies between the codes. It decodes to
    the pruned state, because pruning is never undone.

    Args:
        value (Tensor): One number: a code of :func:`encode`, or an integer of
            :class:`AttentionState`, which earlier versions wrote.

    Returns:
        tuple[AttentionState, bool]: The state, and whether the number was exact
        rather than an average of several states.

    Raises:
        ValueError: If the number is neither a code nor between two of them.
    """
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f'state has shape {tuple(value.shape)}, not one real number')
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
        f'state={number:g} is unknown; allowed are {CODES[AttentionState.ACTIVE]:g} '
        f'(active), {low:g} (value only) and {high:g} (pruned)'
    )


def encode_text(text: str) -> Tensor:
    """Encode text in a tensor that keeps every byte when cast to half precision.

    Args:
        text (str): The text.

    Returns:
        Tensor: Its bytes, (N,), in single precision.
    """
    return torch.tensor(list(text.encode()), dtype=torch.float32)


def decode_text(codes: Tensor) -> str:
    """Decode the tensor of :func:`encode_text`, even after casts and averages."""
    numbers = codes.detach().float().round().clamp(0, 255).to(torch.uint8)
    return bytes(numbers.flatten().tolist()).decode(errors='replace')
