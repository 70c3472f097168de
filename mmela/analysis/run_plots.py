"""Pictures of a run: metrics, loss and active attentions over time."""

from typing import Dict, List

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..visualization.drawing import (
    MARKERS,
    WIDTH,
    Plot,
    Theme,
    legend_above,
    plain_text,
)
from .work_dir import Run


def metric_groups(run: Run) -> Dict[str, List[str]]:
    """Group metrics that share an axis.

    Returns:
        dict[str, list[str]]: Names of metrics by the label of their axis. COCO metrics
        by object size are left out, and so are those that are always -1, which means
        that there are no such objects.
    """
    groups: Dict[str, List[str]] = {}
    for name in run.metric_names:
        values = [m[name] for m in run.metrics.values() if name in m]
        if name.startswith('coco/'):
            if name.endswith(('_s', '_m', '_l')) or set(values) <= {-1}:
                continue
            label = 'COCO metric (0 to 1)'
        elif name.startswith('accuracy/'):
            label = 'accuracy (%)'
        else:
            label = name.rpartition('/')[0] or name
        groups.setdefault(label, []).append(name)
    return groups


def metrics_plot(run: Run) -> Plot:
    """Validation metrics over epochs, with one axis for each kind of metric.

    Args:
        run (Run): A run with metrics.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    groups = metric_groups(run)

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, 3 * max(len(groups), 1))
        panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
        for axes, (label, names) in zip(panels, groups.items()):
            for index, name in enumerate(names):
                points = [
                    (step, m[name]) for step, m in run.metrics.items() if name in m
                ]
                axes.plot(
                    *zip(*points),
                    color=theme.lines[index % len(theme.lines)],
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4.5,
                    linewidth=1.3,
                    label=plain_text(name.rpartition('/')[2]),
                )
            axes.grid(color=theme.faint, linewidth=0.6)
            axes.set(xlabel=f'{run.unit}s done', ylabel=plain_text(label))
            axes.set_xlim(0, max(run.metrics) * 1.03 or 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            legend_above(axes, min(len(names), 3))

    return plot


def loss_plot(run: Run) -> Plot:
    """Training loss over iterations, with prunings marked.

    Args:
        run (Run): A run with training losses.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    steps = np.array(list(run.losses))
    losses = np.array(list(run.losses.values()), dtype=float)

    def plot(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot(steps, losses, color=theme.kept, lw=1.2, label='loss')
        for index, decision in enumerate(run.decisions):
            axes.axvline(
                decision.iteration,
                color=theme.pruned,
                ls='--',
                lw=1.2,
                label='pruning' if index == 0 else None,
            )
        finite = losses[np.isfinite(losses)]
        if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
            axes.set_yscale('log')
        axes.grid(color=theme.faint, linewidth=0.6)
        axes.set(xlabel='iterations done', ylabel='training loss')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_above(axes, 2)

    return plot


def timeline_plot(run: Run) -> Plot:
    """Active attentions over time, with measuring windows shaded and decisions marked.

    A window that was put off is shaded where it was measured last.

    Args:
        run (Run): A run with prunings.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    ends = [decision.window[1] for decision in run.decisions]
    counts = [run.total_attentions] + [len(d.active) for d in run.decisions]
    windows = [decision.window for decision in run.decisions]
    # Those to come; earlier ones without a decision were given up or missed.
    windows += [window for window in run.hook['windows'] if window[0] > max(ends)]
    unit = 'epoch' if run.hook['by_epoch'] else 'iteration'
    planned = run.planned if unit == run.unit else None
    end = max([planned or 0, run.done or 0, *ends])
    if unit == 'iteration':
        end = max([end, *run.training])

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, 2.6)
        axes = figure.subplots()
        for index, (first, last) in enumerate(windows):
            axes.axvspan(
                first - 1,
                last,
                facecolor=theme.faint,
                linewidth=0,
                label='measuring window' if index == 0 else None,
            )
        axes.step(
            [0, *ends, end],
            [*counts, counts[-1]],
            where='post',
            color=theme.kept,
            lw=2,
            label='active attentions',
        )
        for position, count in zip([0, *ends], counts):
            axes.annotate(
                str(count),
                (position, count),
                xytext=(4, 3),
                textcoords='offset points',
                color=theme.ink,
                fontsize=9,
            )
        for index, position in enumerate(ends):
            axes.axvline(
                position,
                color=theme.pruned,
                ls='--',
                lw=1.2,
                label='decision' if index == 0 else None,
            )
            axes.annotate(
                f'after {unit} {position}',
                (position, 0),
                xytext=(-3 if position > end / 2 else 3, 3),
                textcoords='offset points',
                rotation=90,
                ha='right' if position > end / 2 else 'left',
                color=theme.ink,
                fontsize=8,
            )
        axes.set(xlabel=f'{unit}s done', ylabel='active attentions')
        axes.set(xlim=(0, end or 1), ylim=(0, counts[0] * 1.15 or 1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        legend_above(axes, 2)

    return plot
