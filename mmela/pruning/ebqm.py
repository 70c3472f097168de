from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import numpy as np
from scipy import special

from ..arguments import check_number


@dataclass(frozen=True)
class PooledDecision:
    """A decision on pooled values. Its arrays have their shape, (L,).

    Attributes:
        skip (ndarray): Whether a layer is skipped.
        selected (ndarray): Whether its value is in the set S of values up to the
            quantile.
        normalized (ndarray): Value after min-max normalisation within S, NaN
            outside S.
        mapped (ndarray): CDF of the normalised value, NaN outside S.
        quantile (float): The ``gamma``-quantile of all values; NaN if there
            are no values.
    """

    skip: np.ndarray
    selected: np.ndarray
    normalized: np.ndarray
    mapped: np.ndarray
    quantile: float


def check_kl(kl: Sequence[float], names: Optional[Sequence[str]] = None) -> np.ndarray:
    """Check KL divergences.

    Returns:
        ndarray: The values in double precision, (L,).

    Raises:
        ValueError: If a value is NaN or infinite; the error names the layer.
    """
    kl = np.asarray(kl, dtype=np.float64)
    if kl.ndim != 1:
        raise ValueError(f'kl has shape {kl.shape}; it must be (L,)')
    for index in np.flatnonzero(~np.isfinite(kl)).tolist():
        name = names[index] if names is not None else f'layer {index}'
        raise ValueError(
            f'the KL divergence of {name} is {kl[index]}; it must be finite. Check '
            'whether the training has diverged'
        )
    return kl


def beta_cdf(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """CDF of the Beta distribution (ELA, eq. 9)."""
    return special.betainc(alpha, beta, x)


def map_quantiles(
    kl: np.ndarray, gamma: float, mu: float, cdf: Callable[[np.ndarray], np.ndarray]
) -> PooledDecision:
    """Algorithm 1 of ELA with any CDF on [0, 1]."""
    normalized = np.full(kl.shape, np.nan)
    mapped = np.full(kl.shape, np.nan)
    skip = np.zeros(kl.shape, dtype=bool)
    if kl.size == 0:
        return PooledDecision(skip, skip.copy(), normalized, mapped, np.nan)
    quantile = float(np.quantile(kl, gamma))
    selected = kl <= quantile
    values = kl[selected]
    # Equal values give no order, so nothing is skipped.
    if values.size >= 2 and values.max() > values.min():
        normalized[selected] = (values - values.min()) / (values.max() - values.min())
        mapped[selected] = cdf(normalized[selected])
        skip[selected] = mapped[selected] < mu
    return PooledDecision(skip, selected, normalized, mapped, quantile)


def ebqm(
    kl: Sequence[float],
    gamma: float = 0.5,
    alpha: float = 2.0,
    beta: float = 5.0,
    mu: float = 0.2,
) -> PooledDecision:
    """Enhanced Beta Quantile Mapping (ELA, algorithm 1).

    It normalises the values up to their ``gamma``-quantile and skips those whose
    Beta CDF is below ``mu``. It skips nothing if fewer than two values are up to the
    quantile or if they are all equal.

    Args:
        kl (Sequence[float]): KL divergence of each layer, (L,).
        gamma (float): Quantile in (0, 1], interpolated linearly. The paper
            gives no value. Defaults to 0.5.
        alpha (float): First shape parameter of the Beta distribution, > 0.
            ELA: 5 for CIFAR, 2 for ImageNet and COCO. Defaults to 2.
        beta (float): Second shape parameter, > 0. ELA: 1 for CIFAR, 5 for
            ImageNet and COCO. Defaults to 5.
        mu (float): Threshold in [0, 1]. ELA: 0.3 for CIFAR, 0.25 for ImageNet,
            0.2 for COCO. Defaults to 0.2.

    Returns:
        PooledDecision: Which layers are skipped, with the numbers behind it.

    Raises:
        ValueError: If an argument is out of range or a value is not finite.
    """
    check_number('gamma', gamma, 0, 1, open_low=True)
    check_number('alpha', alpha, 0, open_low=True)
    check_number('beta', beta, 0, open_low=True)
    check_number('mu', mu, 0, 1)
    return map_quantiles(check_kl(kl), gamma, mu, lambda x: beta_cdf(x, alpha, beta))
