import math
from dataclasses import dataclass
from typing import Any, Tuple

import numpy as np
from scipy import special


@dataclass(frozen=True)
class Divergence:
    """KL divergence between two adjacent attentions, in its two parts.

    Attributes:
        shape (float): How differently they mix the tokens that both see, see
            :func:`split_kl`; in nats.
        own (float): How much the later one looks at what the earlier one
            lacks, in nats.
        shared (int): Tokens ``t`` that both see.
        more (int): Tokens ``n`` that only the later one sees; 0 where both see the
            same.
    """

    shape: float
    own: float
    shared: int
    more: int

    @property
    def total(self) -> float:
        """float: The divergence (ELA, eq. 8)."""
        return self.shape + self.own

    @property
    def baseline(self) -> float:
        """float: Its value where both weigh all tokens alike,
        ``log((t + n) / t)``: a function of the position alone."""
        return math.log((self.shared + self.more) / self.shared)


def split_kl(log_p, log_q, eps: float = 1e-8) -> Tuple[Any, Any]:
    r"""Split the KL divergence of :func:`attention_kl` into its two parts.

    With ``P`` the earlier attention, ``Q`` the later one, ``Q'`` that one
    renormalised over the tokens of ``P``, and ``q`` the weight that it gives
    to the others,

    .. math::
        D(P \Vert Q) = \underbrace{D(P \Vert Q')}_{shape}
        + \underbrace{-\log(1 - q)}_{own}

    exactly; the term of ``eps`` counts as a part of ``own``, as it depends on
    the tokens that ``P`` lacks alone. The shape is >= 0, and 0 where both mix
    the tokens alike, so always where ``P`` has but one.

    Args:
        log_p (ndarray | Tensor): Log-probabilities of the earlier block,
            (..., t).
        log_q (ndarray | Tensor): Log-probabilities of the later block,
            (..., t + n), of the same kind as ``log_p``. Where ``n`` is 0, as within
            a group of blocks that add to one token, all is shape.
        eps (float): Probability of a token that the earlier block lacks.
            Defaults to 1e-8.

    Returns:
        tuple[ndarray | Tensor, ndarray | Tensor]: Shape and own part in nats,
        each (...), on the device and in the dtype of the arguments.

    Raises:
        ValueError: If ``eps`` is not in (0, 1) or the later block attends over
            fewer tokens than the earlier one.
    """
    if not 0 < eps < 1:
        raise ValueError(f'eps={eps} is not in (0, 1)')
    tokens, more = log_p.shape[-1], log_q.shape[-1]
    if more < tokens:
        raise ValueError(
            f'the later block attends over {more} tokens and the earlier one '
            f'over {tokens}; it must not be fewer'
        )
    library: Any = np
    logsumexp: Any = special.logsumexp
    if not isinstance(log_p, np.ndarray):
        import torch

        library, logsumexp = torch, torch.logsumexp
    p, where = library.exp(log_p), library.where
    # p log(p / q) -> 0 for p -> 0, but 0 * inf is NaN: whether log p is -inf
    # or p has underflowed, leave no infinity to multiply by.
    zero = p == 0
    shared = log_q[..., :tokens]
    kept = logsumexp(shared, -1)  # log(1 - q)
    # Where nothing is kept there is no mixture to compare.
    scale = where(library.isinf(kept), 0.0, kept)
    log_ratio = where(zero, 0.0, log_p) - where(zero, 0.0, shared - scale[..., None])
    shape = where(library.isinf(kept), 0.0, (p * log_ratio).sum(-1))
    padding = eps * (math.log(eps) - log_q[..., tokens:])
    # Rounding leaves sums of exactly cancelling terms a little below 0.
    return where(shape < 0, 0.0, shape), padding.sum(-1) - kept


def attention_kl(log_p, log_q, eps: float = 1e-8):
    """KL divergence between the attention weights of two adjacent blocks.

    The later block attends over tokens that the earlier one lacks. Each of
    those gets the probability ``eps`` in the earlier distribution, which is
    not normalised again (ELA, eq. 8). Log-probabilities keep the result finite
    where a softmax underflows to 0. A token to which the earlier block gives
    exactly 0 adds nothing; one to which only the later block does makes the
    divergence infinite, see :func:`safe_log`.

    Args:
        log_p (ndarray | Tensor): See :func:`split_kl`.
        log_q (ndarray | Tensor): See :func:`split_kl`.
        eps (float): See :func:`split_kl`. Defaults to 1e-8.

    Returns:
        ndarray | Tensor: KL divergence in nats, (...), the sum of the parts
        that :func:`split_kl` returns.

    Raises:
        ValueError: As :func:`split_kl` does.
    """
    shape, own = split_kl(log_p, log_q, eps)
    return shape + own


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
