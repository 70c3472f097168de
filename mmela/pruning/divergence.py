import math
from typing import Any

import numpy as np


def attention_kl(log_p, log_q, eps: float = 1e-8):
    """KL divergence between the attention weights of two adjacent blocks.

    The later block attends over tokens that the earlier one lacks. Each of
    those gets the probability ``eps`` in the earlier distribution, which is
    not normalised again (ELA, eq. 8). Log-probabilities keep the result finite
    where a softmax underflows to 0. A token to which the earlier block gives
    exactly 0 adds nothing; one to which only the later block does makes the
    divergence infinite, see :func:`safe_log`.

    Args:
        log_p (ndarray | Tensor): Log-probabilities of the earlier block,
            (..., t).
        log_q (ndarray | Tensor): Log-probabilities of the later block,
            (..., t + n) with n >= 1, of the same kind as ``log_p``.
        eps (float): Probability of a token that the earlier block lacks.
            Defaults to 1e-8.

    Returns:
        ndarray | Tensor: KL divergence in nats, (...), on the device and in
        the dtype of the arguments.

    Raises:
        ValueError: If ``eps`` is not in (0, 1) or the later block does not
            attend over more tokens than the earlier one.
    """
    if not 0 < eps < 1:
        raise ValueError(f'eps={eps} is not in (0, 1)')
    tokens, more = log_p.shape[-1], log_q.shape[-1]
    if more <= tokens:
        raise ValueError(
            f'the later block attends over {more} tokens and the earlier one '
            f'over {tokens}; it must be more'
        )
    library: Any = np
    if not isinstance(log_p, np.ndarray):
        import torch

        library = torch
    p, where = library.exp(log_p), library.where
    # p log(p / q) -> 0 for p -> 0, but 0 * inf is NaN: whether log p is -inf
    # or p has underflowed, leave no infinity to multiply by.
    zero = p == 0
    log_ratio = where(zero, 0.0, log_p) - where(zero, 0.0, log_q[..., :tokens])
    padding = eps * (math.log(eps) - log_q[..., tokens:])
    return (p * log_ratio).sum(-1) + padding.sum(-1)


def safe_log(probs):
    """Logarithm of probabilities that may have underflowed to 0.

    For distributions that are averaged before :func:`attention_kl`, whose
    log-probabilities are no longer at hand.

    Args:
        probs (ndarray | Tensor): Probabilities, of any shape and a
            floating-point dtype.

    Returns:
        ndarray | Tensor: Their logarithm, finite: what is below the smallest
        normal number of the dtype is taken as that number.
    """
    if isinstance(probs, np.ndarray):
        return np.log(np.maximum(probs, np.finfo(probs.dtype).tiny))
    from torch import finfo

    return probs.clamp(min=finfo(probs.dtype).tiny).log()
