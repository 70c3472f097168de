import math
from dataclasses import dataclass
from typing import Any, Tuple

import numpy as np
from scipy import special


@dataclass(frozen=True)
class Divergence:
    """KL divergence between two adjacent attentions, in its two parts.

    Attributes:
        shape (float): How differently they mix the tokens that both see, in
            nats; see :func:`split_kl`.
        own (float): How much weight the later one puts on tokens that the
            earlier one lacks, in nats.
        shared (int): Tokens ``t`` that both see.
        more (int): Number of tokens ``n`` that only the later one sees; 0 if both see
            the same.
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
        """float: Its value if both weigh all tokens equally,
        ``log((t + n) / t)``, which depends on the position alone."""
        return math.log((self.shared + self.more) / self.shared)


def split_kl(log_p, log_q, eps: float = 1e-8) -> Tuple[Any, Any]:
    r"""Split the KL divergence of :func:`attention_kl` into its two parts.

    Let ``P`` be the earlier attention, ``Q`` the later one, ``Q'`` the later one
    renormalised over the tokens of ``P``, and ``q`` the weight that ``Q`` gives to
    the other tokens. Then exactly

    .. math::
        D(P \Vert Q) = \underbrace{D(P \Vert Q')}_{shape}
        + \underbrace{-\log(1 - q)}_{own}

    The term of ``eps`` counts towards ``own``, because it depends only on the
    tokens that ``P`` lacks. The shape is >= 0; it is 0 if both mix the tokens the
    same way, and so always if ``P`` has a single token.

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
            f'over {tokens}; the later one must not have fewer'
        )
    library: Any = np
    logsumexp: Any = special.logsumexp
    if not isinstance(log_p, np.ndarray):
        import torch

        library, logsumexp = torch, torch.logsumexp
    p, where = library.exp(log_p), library.where
    # p log(p / q) -> 0 for p -> 0, but 0 * inf is NaN: mask the infinities where
    # log p is -inf or p has underflowed.
    zero = p == 0
    shared = log_q[..., :tokens]
    kept = logsumexp(shared, -1)  # log(1 - q)
    # If nothing is kept there is no mixture to compare.
    scale = where(library.isinf(kept), 0.0, kept)
    log_ratio = where(zero, 0.0, log_p) - where(zero, 0.0, shared - scale[..., None])
    shape = where(library.isinf(kept), 0.0, (p * log_ratio).sum(-1))
    padding = eps * (math.log(eps) - log_q[..., tokens:])
    # Rounding can push sums of cancelling terms slightly below 0.
    return where(shape < 0, 0.0, shape), padding.sum(-1) - kept


def attention_kl(log_p, log_q, eps: float = 1e-8):
    """KL divergence between the attention weights of two adjacent blocks.

    The later block attends over tokens that the earlier one lacks. Each of these
    gets the probability ``eps`` in the earlier distribution, which is not
    renormalised (ELA, eq. 8). Log-probabilities keep the result finite where a
    softmax underflows to 0. A token with probability exactly 0 in the earlier block
    adds nothing; a token with probability 0 in the later block alone makes the
    divergence infinite, see :func:`safe_log`.

    Args:
        log_p (ndarray | Tensor): See :func:`split_kl`.
        log_q (ndarray | Tensor): See :func:`split_kl`.
        eps (float): See :func:`split_kl`. Defaults to 1e-8.

    Returns:
        ndarray | Tensor: KL divergence in nats, (...), the sum of the parts
        that :func:`split_kl` returns.

    Raises:
        ValueError: As in :func:`split_kl`.
    """
    shape, own = split_kl(log_p, log_q, eps)
    return shape + own


def safe_log(probs):
    """Logarithm of probabilities that may have underflowed to 0.

    Use it for distributions that were averaged before :func:`attention_kl`, since
    their log-probabilities are lost.

    Args:
        probs (ndarray | Tensor): Probabilities, of any shape and a
            floating-point dtype.

    Returns:
        ndarray | Tensor: Their logarithm. It is finite, because probabilities are
        clamped to the smallest normal number of the dtype.
    """
    if isinstance(probs, np.ndarray):
        return np.log(np.maximum(probs, np.finfo(probs.dtype).tiny))
    from torch import finfo

    return probs.clamp(min=finfo(probs.dtype).tiny).log()
