from abc import abstractmethod
from dataclasses import replace
from typing import Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from scipy import special

from ..arguments import (
    CheckedArguments,
    check_choice,
    check_count,
    check_number,
    did_you_mean,
)
from .divergence import Divergence
from .ebqm import PooledDecision, beta_cdf, check_kl, map_quantiles
from .record import LayerDecision
from .registry import PRUNING_POLICIES

CRITERIA = ('total', 'shape', 'random', 'position')


class PruningPolicy(metaclass=CheckedArguments):
    """Base class of the policies, with pooling, limits and reasons.

    Args:
        scope (str): Pool the values of the whole ``'network'``, or of each
            ``'stage'``. Defaults to ``'network'``.
        min_active_per_stage (int): Attentions that stay active in each stage,
            including the first one, which is never pruned. Defaults to 1.
        max_pruned (int, optional): Maximum number of attentions that one decision
            prunes. Defaults to None, which means no limit.
        criterion (str): The value to judge. ``'total'``: the KL divergence, as in
            the paper. ``'shape'``: its shape part, see
            :func:`~mmela.pruning.split_kl`; an attention whose predecessor sees
            one token has no shape and is kept. Two controls show what the choice
            itself is worth, because they prune the same number of attentions:
            ``'random'`` permutes the divergences of a pool, ``'position'`` sorts
            them by ``log((t + n) / t)``, which falls along a stage; in a tie the
            earlier layer gets the smaller one. Defaults to ``'total'``.

    If a limit applies, the smallest judged values are pruned first, and in a tie
    the earlier layer.

    Raises:
        ValueError: If an argument is out of range.
    """

    threshold: Optional[float] = None

    def __init__(
        self,
        scope: str = 'network',
        min_active_per_stage: int = 1,
        max_pruned: Optional[int] = None,
        criterion: str = 'total',
    ) -> None:
        check_choice('criterion', criterion, CRITERIA)
        check_choice('scope', scope, ('network', 'stage'))
        self.criterion = criterion
        self.scope = scope
        self.min_active_per_stage = check_count(
            'min_active_per_stage', min_active_per_stage, 1
        )
        self.max_pruned = (
            max_pruned
            if max_pruned is None
            else check_count('max_pruned', max_pruned, 0)
        )

    @property
    def config(self) -> dict:
        """dict: Config of this policy, with defaults. A subclass has to store its
        arguments as attributes of the same names."""
        return dict(type=type(self).__name__, **vars(self))

    def __repr__(self) -> str:
        arguments = ', '.join(
            f'{k}={v!r}' for k, v in vars(self).items() if v is not None
        )
        return f'{type(self).__name__}({arguments})'

    @abstractmethod
    def decide(self, kl: np.ndarray) -> PooledDecision:
        """Decide on pooled values.

        Args:
            kl (ndarray): Finite KL divergences, (M,).

        Returns:
            PooledDecision: The decision before the limits.
        """

    def map(self, x: np.ndarray) -> Optional[np.ndarray]:
        """Map normalised values in [0, 1] to the scale of the threshold.

        Args:
            x (ndarray): Normalised values, (M,).

        Returns:
            ndarray | None: Mapped values, which increase with ``x``, (M,). None,
            the default, for a policy without such a function.
        """
        return None

    def threshold_divergence(self, layers: Sequence[LayerDecision]) -> Optional[float]:
        """The value below which this policy judged attentions redundant.

        Args:
            layers (Sequence[LayerDecision]): Its decisions.

        Returns:
            float | None: The value in nats; None if the policy counts layers or
            judges each stage by itself, since there is no single value then.
        """
        grid = np.linspace(0, 1, 201)
        curve = self.map(grid)
        points = [
            (layer.value, layer.normalized)
            for layer in layers
            if layer.value is not None and layer.normalized is not None
        ]
        if curve is None or self.threshold is None or self.scope != 'network':
            return None
        if not points or not curve[0] <= self.threshold <= curve[-1]:
            return None
        (low, first), (high, last) = min(points), max(points)
        if first == last:
            return None
        # Invert the mapping, then the normalisation
        at = np.interp(self.threshold, curve, grid)
        return float(low + (high - low) / (last - first) * (at - first))

    def __call__(
        self,
        divergences: Sequence[Union[Divergence, float, None]],
        stages: Optional[Sequence[str]] = None,
        names: Optional[Sequence[str]] = None,
        seed: Union[int, Sequence[int]] = 0,
    ) -> Tuple[LayerDecision, ...]:
        """Decide which attentions are redundant.

        Args:
            divergences (Sequence[Divergence | float | None]): KL divergence of
                each active attention from the previous one, in the order of the
                network, (L,). None if not measured, as for the first one of a
                stage; such an attention is kept. A float gives the total alone.
            stages (Sequence[str], optional): Name of the stage of each, (L,).
                Defaults to a single stage.
            names (Sequence[str], optional): Names of the attentions, (L,).
                Defaults to ``layer 0`` and so on.
            seed (int | Sequence[int]): For ``criterion='random'``. Defaults
                to 0.

        Returns:
            tuple[LayerDecision]: The decisions and the numbers behind them.

        Raises:
            ValueError: If a divergence is NaN or infinite, if the lengths differ,
                or if the criterion needs the parts of a divergence that is a float.
        """
        divergences = list(divergences)
        count = len(divergences)
        stages = [''] * count if stages is None else list(stages)
        names = [f'layer {i}' for i in range(count)] if names is None else list(names)
        if not len(stages) == len(names) == count:
            raise ValueError(
                f'divergences has {count} entries, stages {len(stages)} and names '
                f'{len(names)}; they must have the same length'
            )
        layers: List[LayerDecision] = []
        pools: Dict[str, List[int]] = {}
        for index, (name, stage, given) in enumerate(zip(names, stages, divergences)):
            first = 'first of its stage, ' if stages.index(stage) == index else ''
            layer = LayerDecision(
                name,
                stage,
                threshold=self.threshold,
                reason=f'kept: {first}not measured',
            )
            if given is not None:
                layer = _measured(layer, given)
                if self.criterion == 'shape' and getattr(given, 'shared', 0) == 1:
                    layer = replace(layer, reason='kept: one token has no shape')
                else:
                    key = stage if self.scope == 'stage' else ''
                    pools.setdefault(key, []).append(index)
            layers.append(layer)
        check_kl(
            [layer.divergence for layer in layers if layer.divergence is not None],
            [layer.name for layer in layers if layer.divergence is not None],
        )
        rng = np.random.default_rng(seed)
        for pool in pools.values():
            values = self._judged([layers[index] for index in pool], rng)
            result = self.decide(values)
            for index, value, skip, selected, normalized, mapped in zip(
                pool,
                values,
                result.skip,
                result.selected,
                result.normalized,
                result.mapped,
            ):
                layers[index] = self._explain(
                    replace(
                        layers[index],
                        value=float(value),
                        normalized=_optional(normalized),
                        mapped=_optional(mapped),
                        quantile=_optional(result.quantile),
                        selected=bool(selected),
                        pruned=bool(skip),
                    )
                )
        return self._limit(layers)

    def _judged(
        self, layers: Sequence[LayerDecision], rng: np.random.Generator
    ) -> np.ndarray:
        """Values of a pool by the criterion, (M,)."""
        totals = np.array([layer.divergence for layer in layers], dtype=np.float64)
        if self.criterion == 'total':
            return totals
        if self.criterion == 'random':
            return rng.permutation(totals)
        key = 'shape' if self.criterion == 'shape' else 'baseline'
        for layer in layers:
            if getattr(layer, key) is None:
                raise ValueError(
                    f'criterion={self.criterion!r} needs the parts of a divergence, '
                    f'but {layer.name} has only the total {layer.divergence}'
                )
        parts = np.array([getattr(layer, key) for layer in layers], dtype=np.float64)
        if self.criterion == 'shape':
            return parts
        by_position = np.empty_like(totals)
        by_position[np.argsort(parts, kind='stable')] = np.sort(totals)
        return by_position

    def _explain(self, layer: LayerDecision) -> LayerDecision:
        """Add the reason for a decision on a measured attention."""
        if not layer.selected:
            reason = 'kept: above the quantile'
        elif self.threshold is None:
            reason = 'pruned' if layer.pruned else 'kept: not among the smallest'
        elif layer.mapped is None:
            reason = 'kept: too few different values'
        else:
            verdict, sign = ('pruned', '<') if layer.pruned else ('kept', '>=')
            reason = f'{verdict}: {layer.mapped:.3g} {sign} {self.threshold:g}'
        return replace(layer, reason=reason)

    def _limit(self, layers: List[LayerDecision]) -> Tuple[LayerDecision, ...]:
        """Keep the attentions with the largest values where a limit applies."""
        left: Dict[str, int] = {}
        for layer in layers:
            left[layer.stage] = left.get(layer.stage, 0) + 1
        wanted = [
            (layer.value, index)
            for index, layer in enumerate(layers)
            if layer.pruned and layer.value is not None
        ]
        pruned = 0
        for _, index in sorted(wanted):  # in a tie the earlier layer goes first
            stage = layers[index].stage
            if self.max_pruned is not None and pruned >= self.max_pruned:
                reason = f'kept: max_pruned={self.max_pruned}'
            elif left[stage] <= self.min_active_per_stage:
                reason = f'kept: min_active_per_stage={self.min_active_per_stage}'
            else:
                pruned += 1
                left[stage] -= 1
                continue
            layers[index] = replace(layers[index], pruned=False, reason=reason)
        return tuple(layers)


def build_policy(cfg: Union[dict, PruningPolicy, None] = None) -> PruningPolicy:
    """Build a pruning policy.

    Args:
        cfg (dict | PruningPolicy, optional): Its config, or a policy, which is
            returned. Defaults to ``dict(type='EBQM')``.

    Returns:
        PruningPolicy: The policy.

    Raises:
        ValueError: If ``cfg`` has no type, the type is unknown, or an argument
            is unknown or out of range.
    """
    if isinstance(cfg, PruningPolicy):
        return cfg
    cfg = dict(type='EBQM') if cfg is None else cfg
    known = PRUNING_POLICIES.module_dict
    allowed = ', '.join(sorted(known))
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ValueError(f'policy={cfg!r} has no type; allowed are {allowed}')
    arguments = dict(cfg)
    kind = arguments.pop('type')
    # Not by the registry, which would import any name that a file gives.
    policy = known.get(kind.split('mmela.')[-1]) if isinstance(kind, str) else kind
    if not (isinstance(policy, type) and issubclass(policy, PruningPolicy)):
        raise ValueError(
            f'policy type {kind!r} is unknown{did_you_mean(kind, known)}; allowed are '
            f'{allowed}'
        )
    try:
        return policy(**arguments)
    except TypeError as error:
        raise ValueError(f'policy={dict(cfg)!r}: {error}') from error


def _measured(
    layer: LayerDecision, divergence: Union[Divergence, float]
) -> LayerDecision:
    """Add a measured divergence to a decision."""
    if not isinstance(divergence, Divergence):
        return replace(layer, divergence=float(divergence))
    return replace(
        layer,
        divergence=divergence.total,
        shape=divergence.shape,
        own=divergence.own,
        baseline=divergence.baseline,
    )


def _optional(value: float) -> Optional[float]:
    """The value as a float; None for NaN."""
    return None if np.isnan(value) else float(value)


def _truncated(cdf, x: np.ndarray) -> np.ndarray:
    """Evaluate a CDF truncated to [0, 1], the range of the normalised values."""
    low, high = cdf(0.0), cdf(1.0)
    return (cdf(x) - low) / (high - low)


@PRUNING_POLICIES.register_module()
class EBQM(PruningPolicy):
    """Enhanced Beta Quantile Mapping (ELA, algorithm 1) and its ablations.

    The paper also replaces the Beta CDF with others (table 6), but gives no
    parameters for them. Here Normal and Gamma take the mean and variance of the Beta
    distribution and are truncated to [0, 1]; softmax and sigmoid are scaled to
    [0, 1]. So every mapping takes 0 to 0 and 1 to 1, and only the shapes differ.

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
        check_choice('mapping', mapping, self.MAPPINGS)
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

    def decide(self, kl: np.ndarray) -> PooledDecision:
        return map_quantiles(kl, self.gamma, self.mu, self.map)


@PRUNING_POLICIES.register_module()
class Threshold(PruningPolicy):
    """Prune attentions whose min-max normalised KL divergence is below a threshold.

    This is the threshold-based method of ELA, table 4.

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

    def map(self, x: np.ndarray) -> np.ndarray:
        return x

    def decide(self, kl: np.ndarray) -> PooledDecision:
        return map_quantiles(kl, 1.0, self.mu, self.map)


@PRUNING_POLICIES.register_module()
class FixedCount(PruningPolicy):
    """Prune a fixed number of attentions, those with the smallest divergences.

    This is the fixed layer pruning of ELA, table 4.

    Args:
        count (int): Attentions to prune, per stage if ``scope='stage'``. If fewer
            are measured, all of them are pruned.
        **kwargs: Of :class:`PruningPolicy`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, count: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.count = check_count('count', count, 0)

    def decide(self, kl: np.ndarray) -> PooledDecision:
        skip = np.zeros(kl.shape, dtype=bool)
        skip[np.argsort(kl, kind='stable')[: self.count]] = True
        nothing = np.full(kl.shape, np.nan)
        return PooledDecision(skip, np.ones_like(skip), nothing, nothing.copy(), np.nan)


@PRUNING_POLICIES.register_module()
class QuantileMapping(PruningPolicy):
    r"""Classic quantile mapping to a target distribution (ELA, appendix A).

    A value with the empirical cumulative probability ``p`` maps to
    :math:`F^{-1}(p)` and is pruned if that is below ``mu``. The paper compares Gamma
    (GQM) and Exponential (EQM) targets in table 7, but does not give their parameters
    or say what is compared with the threshold; both are our choice. The largest value
    has ``p = 1``, which an unbounded target maps to infinity, so ``p`` is at most
    ``1 - 1 / (2 n)`` for ``n`` values. This keeps their order.

    ``p`` depends only on the ranks, not on how far apart the values are. Apart from
    ties, the share of pruned attentions is therefore fixed, close to :math:`F(mu)`:
    by default 44 % (Gamma) or 26 % (Exponential). A decision reports ``p`` as the
    normalised value.

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
        check_choice('target', target, ('gamma', 'exponential'))
        self.target = target
        self.mu = check_number('mu', mu, 0)
        self.shape = check_number('shape', shape, 0, open_low=True)
        self.scale = check_number('scale', scale, 0, open_low=True)
        self.rate = check_number('rate', rate, 0, open_low=True)

    @property
    def threshold(self) -> float:
        return self.mu

    def decide(self, kl: np.ndarray) -> PooledDecision:
        nothing = np.full(kl.shape, np.nan)
        everything = np.ones(kl.shape, dtype=bool)
        if kl.size < 2 or kl.max() == kl.min():
            return PooledDecision(
                ~everything, everything, nothing, nothing.copy(), np.nan
            )
        p = (kl[None] <= kl[:, None]).mean(1)
        p = np.minimum(p, 1 - 0.5 / kl.size)
        if self.target == 'gamma':
            mapped = special.gammaincinv(self.shape, p) * self.scale
        else:
            mapped = -np.log1p(-p) / self.rate
        return PooledDecision(mapped < self.mu, everything, p, mapped, np.nan)
