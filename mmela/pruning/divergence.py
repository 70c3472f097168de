import math

import numpy as np


def attention_kl(log_p, log_q, eps: float = 1e-8):
    """KL divergence between the attention weights of two adjacent blocks.

    The later block attends over tokens that the earlier one lacks. Each of
    those gets the probability ``eps`` in the earlier distribution, which is
    not normalised again (ELA, eq. 8). Log-probabilities keep the result finite
    where a softmax underflows to 0.

    Args:
        log_p (ndarray | Tensor): Log-probabilities of the earlier block,
            (..., t).
        log_q (ndarray | Tensor): Log-probabilities of the later block,
            (..., t + n) with n >= 1, of the same kind as ``log_p``.
        eps (float): Probability of a token that the earlier block lacks.
            Defaults to 1e-8.

    Returns:
        ndarray | Tensor: KL divergence in nats, (...).

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
            f'over {tokens}; it must be more')
    if isinstance(log_p, np.ndarray):
        exp, where = np.exp, np.where
    else:
        from torch import exp, where
    # p log p -> 0 for p -> 0, where the product would be 0 * -inf
    terms = where(log_p == -math.inf, 0., exp(log_p) *
                  (where(log_p == -math.inf, 0., log_p) - log_q[..., :tokens]))
    padding = eps * (math.log(eps) - log_q[..., tokens:])
    return terms.sum(-1) + padding.sum(-1)
