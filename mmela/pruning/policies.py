from abc import ABCMeta, abstractmethod
from dataclasses import dataclass
from typing import List, Optional, Sequence

import numpy as np
from scipy import special

from .ebqm import EBQMResult, beta_cdf, check_kl, check_number, map_quantiles
from .registry import PRUNING_POLICIES


@dataclass(frozen=True)
class PruningDecision:
    """What a policy decides on ``L`` active attentions.

    Attributes:
        names (tuple[str]): Names of the attentions.
        kl (ndarray): KL divergences, NaN where unmeasured, (L,).
        skip (ndarray): Whether an attention is pruned, (L,).
        normalized (ndarray): Normalised KL divergence, NaN where undefined.
        mapped (ndarray): What is compared with ``threshold``, NaN where
            undefined.
        threshold (float): NaN for a policy without one.
        reasons (tuple[str]): Why each attention is pruned or kept.
        selected (ndarray): Whether an attention is a candidate, i.e. measured
            and, under EBQM, in the set S, (L,).
        quantile (ndarray): The largest divergence that a candidate of its pool
            may have, NaN where undefined, (L,). It is per attention because
            ``scope='stage'`` has one for each stage.
    """

    names: tuple
    kl: np.ndarray
    skip: np.ndarray
    normalized: np.ndarray
    mapped: np.ndarray
    threshold: float
    reasons: tuple
    selected: np.ndarray
    quantile: np.ndarray

    def rows(self) -> List[dict]:
        """The decision as plain values, one dict per attention.

        Returns:
            list[dict]: With keys ``name``, ``kl``, ``normalized``, ``mapped``,
            ``threshold`` (None instead of NaN), ``skip`` and ``reason``.
        """

        def plain(value):
            return None if np.isnan(value) else float(value)

        return [
            dict(
                name=name,
                kl=plain(self.kl[i]),
                normalized=plain(self.normalized[i]),
                mapped=plain(self.mapped[i]),
                threshold=plain(self.threshold),
                skip=bool(self.skip[i]),
                reason=self.reasons[i],
            )
            for i, name in enumerate(self.names)
        ]


class PruningPolicy(metaclass=ABCMeta):
    """Base of the policies: pooling, limits and reasons.

    Args:
        scope (str): Decide on the values of the whole ``'network'`` together
            or of each ``'stage'`` by itself. Defaults to ``'network'``.
        min_active_per_stage (int): Attentions that stay in each stage, the
            first, which is never pruned, included. Defaults to 1.
        max_pruned (int, optional): Most attentions that one decision prunes.
            Defaults to None.

    Where a limit binds, the smallest KL divergences are pruned first; of equal
    ones the earlier layer.

    Raises:
        ValueError: If an argument is out of range.
    """

    threshold = np.nan

    def __init__(
        self,
        scope: str = 'network',
        min_active_per_stage: int = 1,
        max_pruned: Optional[int] = None,
    ) -> None:
        if scope not in ('network', 'stage'):
            raise ValueError(
                f"scope={scope!r} is unknown; allowed are 'network' and 'stage'"
            )
        self.scope = scope
        self.min_active_per_stage = _check_count(
            'min_active_per_stage', min_active_per_stage, 1
        )
        self.max_pruned = (
            max_pruned
            if max_pruned is None
            else _check_count('max_pruned', max_pruned, 0)
        )

    def __repr__(self) -> str:
        arguments = ', '.join(
            f'{k}={v!r}' for k, v in vars(self).items() if v is not None
        )
        return f'{type(self).__name__}({arguments})'

    @abstractmethod
    def decide(self, kl: np.ndarray) -> EBQMResult:
        """Decide on pooled values.

        Args:
            kl (ndarray): Finite KL divergences, (M,).

        Returns:
            EBQMResult: The decision before the limits.
        """

    def __call__(
        self,
        kl: Sequence[float],
        stages: Optional[Sequence[int]] = None,
        measured: Optional[Sequence[bool]] = None,
        names: Optional[Sequence[str]] = None,
    ) -> PruningDecision:
        """Decide which attentions are redundant.

        Args:
            kl (Sequence[float]): KL divergence of each active attention from
                the one before it, in the order of the network, (L,).
            stages (Sequence[int], optional): Stage of each, (L,). Defaults to
                one stage.
            measured (Sequence[bool], optional): False where there is no
                divergence, as for the first of a stage, (L,); such a layer is
                kept and its entry in ``kl`` ignored. Defaults to all True.
            names (Sequence[str], optional): Names for errors and rows, (L,).
                Defaults to ``layer 0`` and so on.

        Returns:
            PruningDecision: The decision and the numbers behind it.

        Raises:
            ValueError: If a measured value is NaN or infinite, or the lengths
                differ.
        """
        kl = np.array(kl, dtype=np.float64)
        count = len(kl)
        stages = np.zeros(count, int) if stages is None else np.array(stages, dtype=int)
        measured = (
            np.ones(count, bool) if measured is None else np.array(measured, dtype=bool)
        )
        names = [f'layer {i}' for i in range(count)] if names is None else list(names)
        if not len(stages) == len(measured) == len(names) == count:
            raise ValueError(
                f'kl has {count} entries, stages {len(stages)}, measured '
                f'{len(measured)} and names {len(names)}; they must agree'
            )
        kl[~measured] = np.nan
        check_kl(kl[measured], [n for n, m in zip(names, measured) if m])

        normalized, mapped, quantile = np.full((3, count), np.nan)
        wanted, selected = np.zeros(count, bool), np.zeros(count, bool)
        pools = (
            [measured]
            if self.scope == 'network'
            else [measured & (stages == stage) for stage in np.unique(stages)]
        )
        for pool in pools:
            result = self.decide(kl[pool])
            wanted[pool], selected[pool] = result.skip, result.selected
            normalized[pool] = result.normalized
            mapped[pool] = result.mapped
            quantile[pool] = result.quantile

        reasons = [self._reason(*x) for x in zip(measured, selected, wanted, mapped)]
        skip = self._limit(kl, stages, wanted, reasons)
        return PruningDecision(
            tuple(names),
            kl,
            skip,
            normalized,
            mapped,
            self.threshold,
            tuple(reasons),
            selected,
            quantile,
        )

    def _reason(
        self, measured: bool, selected: bool, wanted: bool, mapped: float
    ) -> str:
        if not measured:
            return 'kept: first of its stage, not measured'
        if not selected:
            return 'kept: above the quantile'
        if np.isnan(self.threshold):
            return 'pruned' if wanted else 'kept: not among the smallest'
        if np.isnan(mapped):
            return 'kept: too few different values'
        sign = '<' if wanted else '>='
        return (
            f'{"pruned" if wanted else "kept"}: {mapped:.3g} {sign} {self.threshold:g}'
        )

    def _limit(
        self, kl: np.ndarray, stages: np.ndarray, wanted: np.ndarray, reasons: List[str]
    ) -> np.ndarray:
        """Apply the limits; changes ``reasons`` where one binds."""
        skip = np.zeros_like(wanted)
        left = {stage: int((stages == stage).sum()) for stage in stages}
        # A stable sort of NaN-free values: ties go by position
        candidates = np.flatnonzero(wanted)
        for index in candidates[np.argsort(kl[candidates], kind='stable')]:
            stage = stages[index]
            if self.max_pruned is not None and skip.sum() >= self.max_pruned:
                reasons[index] = f'kept: max_pruned={self.max_pruned}'
            elif left[stage] <= self.min_active_per_stage:
                reasons[index] = (
                    f'kept: min_active_per_stage={self.min_active_per_stage}'
                )
            else:
                skip[index] = True
                left[stage] -= 1
        return skip


def _check_count(name: str, value: int, low: int) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, np.integer))
        or value < low
    ):
        raise ValueError(f'{name}={value!r} is not an integer >= {low}')
    return int(value)


def _truncated(cdf, x: np.ndarray) -> np.ndarray:
    """A CDF truncated to [0, 1], the range of the normalised values."""
    low, high = cdf(0.0), cdf(1.0)
    return (cdf(x) - low) / (high - low)


@PRUNING_POLICIES.register_module()
class EBQM(PruningPolicy):
    """Enhanced Beta Quantile Mapping (ELA, algorithm 1) and its ablations.

    The paper also replaces the Beta CDF by others (table 6) and gives no
    parameters for them. Here Normal and Gamma take the mean and variance of
    the Beta distribution that they replace and are truncated to [0, 1];
    softmax and sigmoid are scaled to [0, 1]. So all mappings take 0 to 0 and
    1 to 1, and only their shapes differ.

    Args:
        gamma (float): Quantile in (0, 1]. Defaults to 0.5.
        alpha (float): First shape parameter, > 0. Defaults to 2.
        beta (float): Second shape parameter, > 0. Defaults to 5.
        mu (float): Threshold in [0, 1]. Defaults to 0.2.
        mapping (str): ``'beta'``, ``'normal'``, ``'gamma'``, ``'softmax'`` or
            ``'sigmoid'``. Defaults to ``'beta'``.
        **kwargs: Of :class:`PruningPolicy`.

    Raises:
        ValueError: If an argument is out of range.
    """

    MAPPINGS = ('beta', 'normal', 'gamma', 'softmax', 'sigmoid')

    def __init__(
        self,
        gamma: float = 0.5,
        alpha: float = 2.0,
        beta: float = 5.0,
        mu: float = 0.2,
        mapping: str = 'beta',
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.gamma = check_number('gamma', gamma, 0, 1, open_low=True)
        self.alpha = check_number('alpha', alpha, 0, open_low=True)
        self.beta = check_number('beta', beta, 0, open_low=True)
        self.mu = check_number('mu', mu, 0, 1)
        if mapping not in self.MAPPINGS:
            raise ValueError(
                f'mapping={mapping!r} is unknown; allowed are '
                f'{", ".join(map(repr, self.MAPPINGS))}'
            )
        self.mapping = mapping

    @property
    def threshold(self) -> float:
        return self.mu

    def map(self, x: np.ndarray) -> np.ndarray:
        """Map normalised values in [0, 1] to [0, 1], increasingly."""
        a, b = self.alpha, self.beta
        mean, var = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
        if self.mapping == 'beta':
            return beta_cdf(x, a, b)
        if self.mapping == 'normal':
            return _truncated(lambda t: special.ndtr((t - mean) / var**0.5), x)
        if self.mapping == 'gamma':
            return _truncated(
                lambda t: special.gammainc(mean**2 / var, t * mean / var), x
            )
        if self.mapping == 'softmax':
            return _truncated(np.exp, x)
        return _truncated(special.expit, x)

    def decide(self, kl: np.ndarray) -> EBQMResult:
        return map_quantiles(kl, self.gamma, self.mu, self.map)


@PRUNING_POLICIES.register_module()
class Threshold(PruningPolicy):
    """Prune where the min-max normalised KL divergence is below a threshold.

    The threshold-based method of ELA, table 4.

    Args:
        mu (float): Threshold in [0, 1]. Defaults to 0.3.
        **kwargs: Of :class:`PruningPolicy`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, mu: float = 0.3, **kwargs) -> None:
        super().__init__(**kwargs)
        self.mu = check_number('mu', mu, 0, 1)

    @property
    def threshold(self) -> float:
        return self.mu

    def decide(self, kl: np.ndarray) -> EBQMResult:
        return map_quantiles(kl, 1.0, self.mu, lambda x: x)


@PRUNING_POLICIES.register_module()
class FixedCount(PruningPolicy):
    """Prune a fixed number of attentions, those of the smallest divergence.

    The fixed layer pruning of ELA, table 4.

    Args:
        count (int): Attentions to prune, per stage if ``scope='stage'``. If
            there are not so many, all that are measured.
        **kwargs: Of :class:`PruningPolicy`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, count: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.count = _check_count('count', count, 0)

    def decide(self, kl: np.ndarray) -> EBQMResult:
        skip = np.zeros(kl.shape, dtype=bool)
        skip[np.argsort(kl, kind='stable')[: self.count]] = True
        nothing = np.full(kl.shape, np.nan)
        return EBQMResult(skip, np.ones_like(skip), nothing, nothing.copy(), np.nan)


@PRUNING_POLICIES.register_module()
class QuantileMapping(PruningPolicy):
    r"""Classic quantile mapping to a target distribution (ELA, appendix A).

    A value of empirical cumulative probability ``p`` is mapped to
    :math:`F^{-1}(p)` and pruned if that is below ``mu``. The paper compares
    Gamma (GQM) and Exponential (EQM) targets in table 7, without their
    parameters and without saying what is compared with the threshold; both are
    decided here. The largest value has ``p = 1``, which a target without
    upper end maps to infinity; ``p`` is therefore taken as at most
    ``1 - 1 / (2 n)`` of ``n`` values, which keeps their order.

    ``p`` depends on the ranks alone, however far apart the values are. So but
    for ties, the share of attentions pruned is fixed: close to :math:`F(mu)`,
    by default 44 % (Gamma) or 26 % (Exponential). A decision reports ``p`` as
    the normalised value.

    Args:
        target (str): ``'gamma'`` or ``'exponential'``. Defaults to
            ``'gamma'``.
        mu (float): Threshold on the scale of the target, >= 0. Defaults to
            0.3.
        shape (float): Shape of the Gamma target, > 0. Defaults to 2.
        scale (float): Scale of the Gamma target, > 0. Defaults to 0.2.
        rate (float): Rate of the Exponential target, > 0. Defaults to 1.
        **kwargs: Of :class:`PruningPolicy`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        target: str = 'gamma',
        mu: float = 0.3,
        shape: float = 2.0,
        scale: float = 0.2,
        rate: float = 1.0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if target not in ('gamma', 'exponential'):
            raise ValueError(
                f"target={target!r} is unknown; allowed are 'gamma' and 'exponential'"
            )
        self.target = target
        self.mu = check_number('mu', mu, 0)
        self.shape = check_number('shape', shape, 0, open_low=True)
        self.scale = check_number('scale', scale, 0, open_low=True)
        self.rate = check_number('rate', rate, 0, open_low=True)

    @property
    def threshold(self) -> float:
        return self.mu

    def decide(self, kl: np.ndarray) -> EBQMResult:
        nothing = np.full(kl.shape, np.nan)
        everything = np.ones(kl.shape, dtype=bool)
        if kl.size < 2 or kl.max() == kl.min():
            return EBQMResult(~everything, everything, nothing, nothing.copy(), np.nan)
        p = (kl[None] <= kl[:, None]).mean(1)
        p = np.minimum(p, 1 - 0.5 / kl.size)
        if self.target == 'gamma':
            mapped = special.gammaincinv(self.shape, p) * self.scale
        else:
            mapped = -np.log1p(-p) / self.rate
        return EBQMResult(mapped < self.mu, everything, p, mapped, np.nan)
