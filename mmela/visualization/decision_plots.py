"""Pictures of one pruning decision: divergences and the mapping of the policy."""

from itertools import groupby
from typing import List, Optional, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..engine.tables import decision_table
from ..pruning import EBQM, PruningDecision, PruningPolicy, build_policy
from .drawing import WIDTH, Plot, Theme, legend_above, plain_text, short_name


def kl_plot(
    decision: PruningDecision,
    labels: Tuple[str, str] = ('kept', 'pruned'),
) -> Plot:
    """KL divergence of each attention as a bar, with pruned ones marked.

    A dot marks the shape part, a tick the divergence of uniform attention.

    Args:
        decision (PruningDecision): The decision.
        labels (tuple[str, str]): Labels of the layers that the policy keeps and of
            those that it prunes. Defaults to ``('kept', 'pruned')``.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    layers = decision.layers
    values = np.array([x.divergence for x in layers if x.divergence is not None])
    positive = values[values > 0]
    log = positive.size and values.min() >= 0 and values.max() > 5 * np.median(positive)
    quantiles = {x.quantile for x in layers if x.quantile is not None}
    policy = known_policy(decision)
    by_total = decision.policy.get('criterion', 'total') == 'total'
    threshold = policy.threshold_divergence(layers) if policy and by_total else None

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, 1.1 + 0.19 * len(layers))
        axes = figure.subplots()
        for pruned, label in zip((False, True), labels):
            chosen = [
                (i, x.divergence)
                for i, x in enumerate(layers)
                if x.pruned == pruned and x.divergence is not None
            ]
            if chosen:
                axes.barh(
                    *zip(*chosen),
                    height=0.72,
                    color=theme.paper if pruned else theme.kept,
                    edgecolor=theme.pruned if pruned else theme.kept,
                    hatch='/////' if pruned else None,
                    linewidth=1,
                    label=label,
                )
        for key, marker, label in (
            ('shape', 'o', 'shape part'),
            ('baseline', '|', 'uniform attention'),
        ):
            points = [
                (getattr(x, key), i)
                for i, x in enumerate(layers)
                if getattr(x, key) is not None
            ]
            if points:
                axes.plot(
                    *zip(*points),
                    ls='none',
                    marker=marker,
                    markersize=4.5 if marker == 'o' else 11,
                    markeredgewidth=1 if marker == 'o' else 1.6,
                    markeredgecolor=theme.ink,
                    markerfacecolor=theme.paper,
                    label=label,
                )
        if log:
            axes.set_xscale('log')
            axes.set_xlim(positive.min() / 3, values.max() * 8)
            if values.max() < 100 * positive.min():
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter('{x:g}')
                axes.xaxis.set_minor_locator(NullLocator())
        else:
            top = values.max() if values.size and values.max() > 0 else 1
            axes.set_xlim(min(0, *values) if values.size else 0, top * 1.3)
        for index, layer in enumerate(layers):
            kl = layer.divergence
            note = _why(layer.reason) if kl is None else f'{kl:.3g}'
            if layer.pruned:
                note += f'  ✕ {labels[1]}'
            left = axes.get_xlim()[0]
            axes.annotate(
                note,
                (left if kl is None else max(kl, layer.baseline or 0, left), index),
                xytext=(3, 0),
                textcoords='offset points',
                va='center',
                fontsize=7.5,
                fontstyle='italic' if kl is None else 'normal',
                fontweight='bold' if layer.pruned else 'normal',
                color=theme.ink,
                bbox=dict(facecolor=theme.paper, edgecolor='none', pad=0.6),
            )
        # Not drawn if each stage has its own quantile
        if len(quantiles) == 1 and by_total:
            gamma = decision.policy.get('gamma')
            axes.axvline(
                *quantiles,
                color=theme.ink,
                ls=':',
                lw=1.2,
                zorder=0.5,
                label='quantile' if gamma is None else f'{gamma:g}-quantile',
            )
        if threshold is not None:
            axes.axvline(
                threshold,
                color=theme.pruned,
                ls='--',
                lw=1.2,
                zorder=0.5,
                label=plain_text(f'{decision.policy["type"]} threshold'),
            )
        names = [plain_text(short_name(x.name)) for x in layers]
        axes.set_yticks(range(len(layers)), names)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        boundaries = np.cumsum(
            [len(list(group)) for _, group in groupby(layers, key=lambda x: x.stage)]
        )
        for boundary in boundaries[:-1]:
            axes.axhline(boundary - 0.5, color=theme.faint, lw=0.8, zorder=0)
        axes.set_xlabel('KL divergence from the previous attention (nats)')
        count = len(axes.get_legend_handles_labels()[0])
        if count:
            # More columns would be wider than the picture
            legend_above(axes, 2 if threshold is not None or count > 3 else 3)

    return plot


def table_plot(decision: PruningDecision) -> Plot:
    """The table of a decision as a picture, for trackers that show no text.

    Args:
        decision (PruningDecision): The decision.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    text = plain_text(decision_table(decision.layers))

    def plot(figure: Figure, theme: Theme) -> None:
        label = figure.text(
            0.5,
            0.5,
            text,
            family='monospace',
            size=7,
            linespacing=1.3,
            ha='center',
            va='center',
            color=theme.ink,
        )
        # The width of letters depends on the resolution
        size = label.get_window_extent(figure.canvas.get_renderer()).size
        figure.set_size_inches(*(size / figure.dpi + 0.2))

    return plot


def known_policy(decision: PruningDecision) -> Optional[PruningPolicy]:
    """Rebuild the policy of a decision to draw its curve.

    Args:
        decision (PruningDecision): The decision.

    Returns:
        PruningPolicy | None: The policy. None if it is unknown here, has no mapping, or
        does not reproduce the decision, since files of format 1 only store the last
        policy.
    """
    try:
        policy = build_policy(decision.policy)
    except ValueError:
        return None
    points = [
        (x.normalized, x.mapped)
        for x in decision.layers
        if None not in (x.normalized, x.mapped)
    ]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    mapped = policy.map(x)
    return policy if mapped is not None and np.allclose(mapped, y, atol=1e-6) else None


def _why(reason: str) -> str:
    """Shorten the reason why an attention has no divergence."""
    kept = 'kept: '
    return reason[len(kept) :].split(',')[0] if reason.startswith(kept) else reason


def mapping_plot(
    decision: PruningDecision,
    labels: Tuple[str, str] = ('kept', 'pruned'),
) -> Plot:
    """Mapped over normalised values, with the threshold.

    Args:
        decision (PruningDecision): A decision with at least one mapped value.
        labels (tuple[str, str]): See :func:`kl_plot`. Defaults to
            ``('kept', 'pruned')``.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    layers = sorted(
        (x for x in decision.layers if x.mapped is not None),
        key=lambda x: (x.mapped, x.divergence),
    )
    known = known_policy(decision)
    grid = np.linspace(0, 1, 201)
    threshold = layers[0].threshold
    quantile_mapping = decision.policy.get('type') == 'QuantileMapping'

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, max(3, 1.1 + 0.16 * len(layers)))
        axes = figure.subplots()
        if known is not None:
            label = type(known).__name__
            if isinstance(known, EBQM) and known.mapping == 'beta':
                label = f'Beta({known.alpha:g}, {known.beta:g}) CDF'
            axes.plot(grid, known.map(grid), color=theme.ink, lw=1.2, label=label)
        if threshold is not None:
            axes.axhline(
                threshold,
                color=theme.ink,
                ls='--',
                lw=1.1,
                label=f'threshold {threshold:g}',
            )
        for pruned, label, marker in zip((False, True), labels, 'oX'):
            chosen = [(x.normalized, x.mapped) for x in layers if x.pruned == pruned]
            if chosen:
                axes.plot(
                    *zip(*chosen),
                    ls='none',
                    marker=marker,
                    markersize=7 if pruned else 6,
                    color=theme.pruned if pruned else theme.kept,
                    label=label,
                )
        top = max([1, *(x.mapped for x in layers)])
        low, high = -0.05 * top, 1.05 * top
        axes.set(xlim=(-0.04, 1.04), ylim=(low, high))
        # Names beside the axes, spread apart and in order
        gap = (high - low) / max(len(layers), 12)
        heights = _spread(
            [x.mapped for x in layers], gap, low + gap / 2, high - gap / 2
        )
        for layer, height in zip(layers, heights):
            axes.annotate(
                plain_text(short_name(layer.name)),
                (layer.normalized, layer.mapped),
                xytext=(1.1, height),
                textcoords='data',
                va='center',
                fontsize=7.5,
                color=theme.ink,
                fontweight='bold' if layer.pruned else 'normal',
                annotation_clip=False,
                arrowprops=dict(
                    arrowstyle='-',
                    color=theme.ink,
                    alpha=0.35,
                    lw=0.6,
                    relpos=(0, 0.5),
                    shrinkA=1,
                    shrinkB=4,
                ),
            )
        axes.grid(color=theme.faint, linewidth=0.6)
        axes.set(
            xlabel='cumulative probability of the KL divergence'
            if quantile_mapping
            else 'normalised KL divergence (0 to 1)',
            ylabel='mapped value',
        )
        legend_above(axes, 2)

    return plot


def _spread(
    values: Sequence[float], gap: float, low: float, high: float
) -> List[float]:
    """Move sorted values at least ``gap`` apart, within bounds."""
    placed: List[float] = []
    for value in values:
        floor = placed[-1] + gap if placed else low
        placed.append(max(value, floor))
    ceiling = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed
