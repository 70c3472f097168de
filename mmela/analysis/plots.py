from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from ..pruning import PRUNING_POLICIES
from .run import Run, short_name

# Inches: on a phone a picture is shown at about this width
WIDTH = 4.6
MARKERS = 'osD^vP*X'


@dataclass(frozen=True)
class Theme:
    """Colours that can be told apart without colour vision (Okabe and Ito).

    Attributes:
        paper (str): Background, that of the page.
        ink (str): Text and axes.
        faint (str): Grid and shading.
        kept (str): What is kept.
        pruned (str): What is pruned.
        lines (tuple[str]): Further lines.
    """

    paper: str
    ink: str
    faint: str
    kept: str
    pruned: str
    lines: Tuple[str, ...]


LIGHT = Theme(
    '#ffffff',
    '#24292f',
    '#d8dee4',
    '#0072b2',
    '#d55e00',
    ('#0072b2', '#d55e00', '#007a5a', '#a8548a', '#24292f'),
)
DARK = Theme(
    '#14181d',
    '#d6dde4',
    '#39424c',
    '#56b4e9',
    '#f0a030',
    ('#56b4e9', '#f0a030', '#2fc49a', '#dd9ac4', '#d6dde4'),
)

Plot = Callable[[Figure, Theme], None]


def draw(plot: Plot, path: Path) -> Tuple[Path, Path]:
    """Draw a picture twice, for a light and a dark page.

    Args:
        plot (Callable[[Figure, Theme], None]): Draws on a figure.
        path (Path): Where the light picture goes, ``NAME.png``; the dark one
            goes to ``NAME_dark.png``.

    Returns:
        tuple[Path, Path]: Both paths.
    """
    paths = path, path.with_name(f'{path.stem}_dark.png')
    for theme, target in zip((LIGHT, DARK), paths):
        figure = Figure(
            figsize=(WIDTH, 3), dpi=160, facecolor=theme.paper, layout='constrained'
        )
        canvas = FigureCanvasAgg(figure)
        plot(figure, theme)
        for axes in figure.axes:
            _dress(axes, theme)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        # A third of the size, and no difference to be seen
        image.quantize(128, method=Image.Quantize.MEDIANCUT).save(target, optimize=True)
    return paths


def _dress(axes: Axes, theme: Theme) -> None:
    """Colour what the plots leave at its default."""
    axes.set_facecolor('none')
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=8, which='both')
    for side, spine in axes.spines.items():
        spine.set_color(theme.ink)
        spine.set_visible(side in ('left', 'bottom'))
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, fontsize=9)
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set(facecolor=theme.paper, edgecolor=theme.faint)
        for text in legend.get_texts():
            text.set(color=theme.ink, fontsize=8)


def _text(value: str) -> str:
    """Keep matplotlib from reading a name as mathematics."""
    return value.replace('$', r'\$')


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(
        loc='lower left',
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.8,
        columnspacing=1.2,
    )


# -- the run ---------------------------------------------------------------


def metric_groups(run: Run) -> Dict[str, List[str]]:
    """Metrics that share an axis.

    Returns:
        dict[str, list[str]]: Names of metrics by the label of their axis. Of
        COCO metrics, those by object size are left out, and so are metrics
        that are -1 throughout, which means that there is nothing to measure.
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
    """Validation metrics over epochs, an axis for each kind of metric.

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
                    label=_text(name.rpartition('/')[2]),
                )
            axes.grid(color=theme.faint, linewidth=0.6)
            axes.set(xlabel=f'{run.unit}s done', ylabel=_text(label))
            axes.set_xlim(0, max(run.metrics) * 1.03 or 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _legend_above(axes, min(len(names), 3))

    return plot


def loss_plot(run: Run) -> Plot:
    """Training loss over iterations, with the prunings marked.

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
        for index, pruning in enumerate(run.prunings):
            axes.axvline(
                pruning['iteration'],
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
        _legend_above(axes, 2)

    return plot


def timeline_plot(run: Run) -> Plot:
    """Active attentions over epochs, with the measuring windows shaded.

    Args:
        run (Run): A run with prunings.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    ends = [p['window'][1] for p in run.prunings]
    counts = [run.total_attentions] + [len(p['active']) for p in run.prunings]
    unit = 'epoch' if run.hook['by_epoch'] else 'iteration'
    planned = run.planned if unit == run.unit else None
    end = max([planned or 0, run.done or 0, *ends])
    if unit == 'iteration':
        end = max([end, *run.training])

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, 2.6)
        axes = figure.subplots()
        for index, (first, last) in enumerate(run.hook['windows']):
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
        axes.set(xlabel=f'{unit}s done', ylabel='active attentions')
        axes.set(xlim=(0, end or 1), ylim=(0, counts[0] * 1.15 or 1))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        _legend_above(axes, 2)

    return plot


# -- one pruning -----------------------------------------------------------


def kl_plot(
    pruning: dict,
    policy: Optional[dict] = None,
    labels: Tuple[str, str] = ('kept', 'pruned'),
) -> Plot:
    """KL divergence of each attention as a bar, the pruned ones marked.

    Args:
        pruning (dict): An entry of ``prunings`` in ``pruning.json``. A layer
            without a divergence may say why under ``note``.
        policy (dict, optional): Config of the policy; the quantile is drawn
            for one over the whole network. Defaults to None.
        labels (tuple[str, str]): What to call the layers that the policy
            keeps and those that it skips. Defaults to
            ``('kept', 'pruned')``.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    layers = pruning['layers']
    values = np.array([x['kl'] for x in layers if x['kl'] is not None])
    positive = values[values > 0]
    log = positive.size and values.min() >= 0 and values.max() > 5 * np.median(positive)
    quantile = None
    if (
        policy
        and 'gamma' in policy
        and values.size
        and policy.get('scope', 'network') == 'network'
    ):
        quantile = np.quantile(values, policy['gamma'])
    threshold = threshold_divergence(policy, layers)

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, 1.1 + 0.19 * len(layers))
        axes = figure.subplots()
        for skip, label in zip((False, True), labels):
            chosen = [
                (i, x['kl'])
                for i, x in enumerate(layers)
                if x['skip'] == skip and x['kl'] is not None
            ]
            if chosen:
                axes.barh(
                    *zip(*chosen),
                    height=0.72,
                    color=theme.paper if skip else theme.kept,
                    edgecolor=theme.pruned if skip else theme.kept,
                    hatch='/////' if skip else None,
                    linewidth=1,
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
            kl = layer['kl']
            note = (
                layer.get('note', 'first of its stage') if kl is None else f'{kl:.3g}'
            )
            if layer['skip']:
                note += f'  ✕ {labels[1]}'
            left = axes.get_xlim()[0]
            axes.annotate(
                note,
                (left if kl is None else max(kl, left), index),
                xytext=(3, 0),
                textcoords='offset points',
                va='center',
                fontsize=7.5,
                fontstyle='italic' if kl is None else 'normal',
                fontweight='bold' if layer['skip'] else 'normal',
                color=theme.ink,
                bbox=dict(facecolor=theme.paper, edgecolor='none', pad=0.6),
            )
        if quantile is not None:
            axes.axvline(
                quantile,
                color=theme.ink,
                ls=':',
                lw=1.2,
                zorder=0.5,
                label=f'{policy["gamma"]:g}-quantile',
            )
        if threshold is not None:
            axes.axvline(
                threshold,
                color=theme.pruned,
                ls='--',
                lw=1.2,
                zorder=0.5,
                label=f'{policy["type"]} threshold',
            )
        names = [_text(short_name(x['name'])) for x in layers]
        axes.set_yticks(range(len(layers)), names)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        boundaries = np.cumsum(
            [
                len(list(group))
                for _, group in groupby(layers, key=lambda x: x.get('stage'))
            ]
        )
        for boundary in boundaries[:-1]:
            axes.axhline(boundary - 0.5, color=theme.faint, lw=0.8, zorder=0)
        axes.set_xlabel('KL divergence from the attention before (nats)')
        if axes.get_legend_handles_labels()[0]:
            # With more, the names would be wider than the picture.
            _legend_above(axes, 3 if threshold is None else 2)

    return plot


def threshold_divergence(
    policy: Optional[dict], layers: Sequence[dict]
) -> Optional[float]:
    """The KL divergence below which a policy found attentions redundant.

    Args:
        policy (dict | None): Config of the policy.
        layers (Sequence[dict]): The decision, ``layers`` in ``pruning.json``.

    Returns:
        float | None: In nats; None where there is no such divergence, as the
        policy counts layers, or judges each stage by itself.
    """
    mapped = [
        x for x in layers if x['mapped'] is not None and x['normalized'] is not None
    ]
    curve = policy_curve(policy, mapped)
    if curve is None or not mapped or policy.get('scope', 'network') != 'network':
        return None
    low, high = (f(mapped, key=lambda x: x['kl']) for f in (min, max))
    if (
        not low['normalized'] < high['normalized']
        or not curve[1][0] <= mapped[0]['threshold'] <= curve[1][-1]
    ):
        return None
    # Back from mapped to normalised values, and from these to divergences
    normalized = np.interp(mapped[0]['threshold'], curve[1], curve[0])
    scale = (high['kl'] - low['kl']) / (high['normalized'] - low['normalized'])
    return float(low['kl'] + scale * (normalized - low['normalized']))


def policy_curve(
    policy: Optional[dict], layers: Sequence[dict]
) -> Optional[np.ndarray]:
    """The function by which a policy maps normalised values.

    Args:
        policy (dict | None): Config of the policy.
        layers (Sequence[dict]): The decision, which the function must agree
            with: a resumed run may have had another policy.

    Returns:
        ndarray | None: Normalised and mapped values, (2, N); None if the
        policy has no such function or is unknown here.
    """
    try:
        built = PRUNING_POLICIES.build(dict(policy or {}, _scope_='mmela'))
    except (KeyError, TypeError, ValueError):
        return None
    if hasattr(built, 'map'):
        function = built.map
    elif (policy or {}).get('type') == 'Threshold':
        function = np.asarray
    else:
        return None
    points = [
        (x['normalized'], x['mapped'])
        for x in layers
        if x['mapped'] is not None and x['normalized'] is not None
    ]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    if not np.allclose(function(x), y, atol=1e-6):
        return None
    grid = np.linspace(0, 1, 201)
    return np.stack([grid, function(grid)])


def mapping_plot(
    pruning: dict,
    policy: Optional[dict] = None,
    labels: Tuple[str, str] = ('kept', 'pruned'),
) -> Plot:
    """Normalised against mapped values, with the threshold.

    Args:
        pruning (dict): An entry of ``prunings`` in ``pruning.json`` with at
            least one mapped value.
        policy (dict, optional): Config of the policy, for its curve. Defaults
            to None.
        labels (tuple[str, str]): See :func:`kl_plot`. Defaults to
            ``('kept', 'pruned')``.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    layers = [x for x in pruning['layers'] if x['mapped'] is not None]
    layers.sort(key=lambda x: (x['mapped'], x['kl']))
    curve = policy_curve(policy, layers)
    policy = policy or {}
    threshold = layers[0]['threshold']
    quantile_mapping = policy.get('type') == 'QuantileMapping'

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, max(3, 1.1 + 0.16 * len(layers)))
        axes = figure.subplots()
        if curve is not None:
            label = policy['type']
            if label == 'EBQM' and policy.get('mapping', 'beta') == 'beta':
                label = (
                    f'Beta({policy.get("alpha", 2):g}, {policy.get("beta", 5):g}) CDF'
                )
            axes.plot(*curve, color=theme.ink, lw=1.2, label=_text(label))
        if threshold is not None:
            axes.axhline(
                threshold,
                color=theme.ink,
                ls='--',
                lw=1.1,
                label=f'threshold {threshold:g}',
            )
        for skip, label, marker in zip((False, True), labels, 'oX'):
            chosen = [
                (x['normalized'], x['mapped']) for x in layers if x['skip'] == skip
            ]
            if chosen:
                axes.plot(
                    *zip(*chosen),
                    ls='none',
                    marker=marker,
                    markersize=7 if skip else 6,
                    color=theme.pruned if skip else theme.kept,
                    label=label,
                )
        top = max([1, *(x['mapped'] for x in layers)])
        low, high = -0.05 * top, 1.05 * top
        axes.set(xlim=(-0.04, 1.04), ylim=(low, high))
        # Names beside the picture, apart from each other and in order
        gap = (high - low) / max(len(layers), 12)
        heights = _spread(
            [x['mapped'] for x in layers], gap, low + gap / 2, high - gap / 2
        )
        for layer, height in zip(layers, heights):
            axes.annotate(
                _text(short_name(layer['name'])),
                (layer['normalized'], layer['mapped']),
                xytext=(1.1, height),
                textcoords='data',
                va='center',
                fontsize=7.5,
                color=theme.ink,
                fontweight='bold' if layer['skip'] else 'normal',
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
        _legend_above(axes, 2)

    return plot


def _spread(
    values: Sequence[float], gap: float, low: float, high: float
) -> List[float]:
    """Move sorted values apart to at least ``gap``, within bounds."""
    placed: List[float] = []
    for value in values:
        floor = placed[-1] + gap if placed else low
        placed.append(max(value, floor))
    ceiling = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed
