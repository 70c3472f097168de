"""Pictures of what :func:`mmela.analysis.measure_attention` measures."""

import math
import re
from typing import (
    Callable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..pruning import PruningDecision
from ..visualization.decision_plots import kl_plot, mapping_plot
from ..visualization.drawing import (
    MARKERS,
    WIDTH,
    Plot,
    Theme,
    legend_above,
    plain_text,
    short_name,
)

# Blue to yellow, of evenly growing lightness: also without colour vision
COLOURS = 'cividis'
NOW = ('active', 'would be pruned')
GONE = ('pruned', 'value_only')


class Picture(NamedTuple):
    """A picture and what to say about it.

    Attributes:
        name (str): File name without suffix.
        title (str): What it shows.
        caption (str): How to read it, one or two sentences.
        plot (Callable[[Figure, Theme], None]): For
            :func:`mmela.visualization.drawing.draw`.
        detail (bool): Whether it is one for a closer look, which a report
            leaves out. Defaults to False.
        stage (str): Name of the stage of which it is the map; empty for other
            pictures, which is the default.
    """

    name: str
    title: str
    caption: str
    plot: Plot
    detail: bool = False
    stage: str = ''


def attention_pictures(result: dict) -> Iterator[Picture]:
    """All pictures that a measurement allows.

    Args:
        result (dict): See :func:`mmela.analysis.measure_attention`.

    Yields:
        Picture: One after the other, maps first.
    """
    stages = result['stages']
    for name, stage in stages.items():
        label, file = short_name(name), _file_name(name)
        if stage['maps']:
            yield Picture(
                f'maps_{file}',
                f'Attention weights of {label}',
                'Mean over images and heads. A row is the block that asks, a '
                'column the block that it attends to; ✕ and hatching mark what '
                'is pruned. Rows that look alike are redundant.',
                map_plot(stage),
                stage=name,
            )
        if stage['maps'] and len(stage['maps']['heads']) > 1:
            yield Picture(
                f'heads_{file}',
                f'Attention weights of {label} by head',
                'Mean over images, one map for each head, laid out as the map '
                'of the mean; grey marks what is pruned.',
                heads_plot(stage),
                True,
            )
        if stage.get('scores'):
            yield Picture(
                f'scores_{file}',
                f'Attention scores of {label} by head',
                'Share of each block in what a block retrieves, mean over images, '
                'for the first, the middle and the last head: a larger s '
                'concentrates it on keys of large norm. "Before" is what was taken '
                'over from the stage before. "At the limit" are weights of which '
                'the exponent is cut to 10: such blocks weigh the same.',
                scores_plot(stage),
            )
    if result['decision'] and any('active' in s['states'] for s in stages.values()):
        decision = PruningDecision.from_dict(result['decision'])
        yield Picture(
            'kl',
            'KL divergence of adjacent active attentions',
            'How much the weights of an attention differ from those of the '
            'active one before it in its stage. Hatched: what the policy '
            'would prune now; ✕ alone: what is pruned already.',
            kl_plot(decision, NOW),
        )
        if any(layer.mapped is not None for layer in decision.layers):
            yield Picture(
                'policy',
                'What the policy makes of the divergences',
                'Below the threshold is redundant. What is above the quantile '
                'is not mapped and not shown.',
                mapping_plot(decision, NOW),
            )
    if any(stage['features'] for stage in stages.values()):
        yield Picture(
            'features',
            'Similarity of the features of adjacent blocks',
            'Cosine similarity of the outputs of a block and the one before, '
            'attention included: mean and standard deviation over images.',
            similarity_plot(stages, 'features'),
        )
    if any(stage['queries'] for stage in stages.values()):
        yield Picture(
            'queries',
            'Similarity of the queries of adjacent attentions',
            'Absolute cosine similarity of the queries of an active attention '
            'and the active one before, averaged over heads: mean and '
            'standard deviation over images. Below, how often each value '
            'occurs, without the first attention of a stage.',
            similarity_plot(stages, 'queries', result['histogram']),
        )
    if any(stage.get('keys') for stage in stages.values()):
        yield Picture(
            'keys',
            'Similarity of the keys of the blocks',
            'Cosine similarity of the keys of each two blocks of a stage, mean over '
            'heads and images; above each map the mean over all pairs. 1 means '
            'that they differ in length alone, 0 that one of them is all zeros.',
            keys_plot(stages),
        )
    if any(stage['contributions'] for stage in stages.values()):
        yield Picture(
            'contributions',
            "What of a layer reaches its stage's last output",
            'Product of |lambda_o| of the later layers: mean and standard '
            'deviation over channels. 1 is undiminished.',
            contributions_plot(stages),
        )


def _file_name(name: str) -> str:
    return re.sub(r'\W+', '_', short_name(name))


# -- attention maps --------------------------------------------------------


def _array(rows: Sequence[Sequence[float]]) -> np.ma.MaskedArray:
    """Weights with None where there is none, as a masked array."""
    return np.ma.masked_invalid(np.array(rows, dtype=float))


def _ticks(states: Sequence[str]) -> List[str]:
    return [f'✕ {i}' if s in GONE else str(i) for i, s in enumerate(states)]


def _hatch(
    axes: Axes, x: float, y: float, width: float, height: float, theme: Theme
) -> None:
    axes.add_patch(
        Rectangle(
            (x - 0.5, y - 0.5),
            width,
            height,
            facecolor=theme.faint,
            edgecolor=theme.pruned,
            hatch='////',
            linewidth=0,
        )
    )


def _hatch_pruned(axes: Axes, states: Sequence[str], theme: Theme) -> None:
    """Hatch rows that ask nothing and columns that nobody can attend to."""
    for i, state in enumerate(states):
        if state == 'active':
            continue
        _hatch(axes, 0, i, i + (state == 'value_only'), 1, theme)
        if state != 'value_only':
            _hatch(axes, i, i, 1, len(states) - i, theme)


def _colourbar(
    figure: Figure,
    image: AxesImage,
    axes: Union[Axes, List[Axes]],
    theme: Theme,
    label: str = 'attention weight',
) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(label, color=theme.ink, fontsize=9)


def map_plot(stage: dict) -> Plot:
    """Attention weights of a stage as a heat map (ELA, figures 2a, 6, 7).

    Args:
        stage (dict): One of ``stages`` of a measurement, with maps.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """
    count = len(stage['states'])

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, min(1.6 + 0.45 * count, 4.1))
        # The other layouts push the labels of a map as wide as this out.
        figure.set_layout_engine('compressed')
        axes = figure.subplots()
        _colourbar(figure, _draw_map(axes, stage, theme), axes, theme)

    return plot


def map_pair_plot(stages: Sequence[Tuple[str, dict]]) -> Plot:
    """Attention weights of a stage at several times, side by side.

    Args:
        stages (Sequence[tuple[str, dict]]): Title, and the stage in one
            measurement, with maps.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(0.6 + 2.9 * len(stages), 3.2)
        figure.set_layout_engine('compressed')
        panels = figure.subplots(1, len(stages), squeeze=False)[0]
        for axes, (title, stage) in zip(panels, stages):
            image = _draw_map(axes, stage, theme)
            axes.set_title(title.replace('$', r'\$'), color=theme.ink, fontsize=9)
        _colourbar(figure, image, list(panels), theme)

    return plot


def _draw_map(axes: Axes, stage: dict, theme: Theme) -> AxesImage:
    """Draw the mean attention weights of a stage."""
    return _draw_weights(axes, stage['maps']['mean'], stage['states'], theme)


def _draw_weights(
    axes: Axes,
    rows: Sequence[Sequence[float]],
    states: Sequence[str],
    theme: Theme,
    before: Optional[Sequence[float]] = None,
) -> AxesImage:
    """Draw weights of a stage, a column for each block.

    ``before`` are weights of something before the first block, if any.
    """
    weights = _array(rows)
    count = len(states)
    left = 0 if before is None else -1
    if before is not None:
        weights = np.ma.column_stack([_array([before]).T, weights])
    image = axes.imshow(
        weights,
        cmap=COLOURS,
        vmin=0,
        vmax=1,
        extent=(left - 0.5, count - 0.5, count - 0.5, -0.5),
    )
    _hatch_pruned(axes, states, theme)
    if count <= 8:
        _number_cells(axes, weights, left, lambda weight: weight < 0.5)
    step = math.ceil(count / 24)
    ticks = _ticks(states)[::step]
    places = list(range(0, count, step))
    axes.set_yticks(places, ticks)
    if before is not None:
        places, ticks = [-1, *places], ['before', *ticks]
    turn = 90 if count > 12 or before is not None else 0
    axes.set_xticks(places, ticks, rotation=turn)
    axes.set(xlabel='attended block', ylabel='asking block')
    return image


def _number_cells(
    axes: Axes,
    values: np.ma.MaskedArray,
    left: int,
    dark: Callable[[float], bool],
) -> None:
    """Write the values of a map into its cells, which begin at ``left``."""
    for row, column in zip(*np.nonzero(~np.ma.getmaskarray(values))):
        value = values[row, column]
        axes.text(
            column + left,
            row,
            f'{value:.2f}',
            ha='center',
            va='center',
            fontsize=7,
            color='white' if dark(value) else 'black',
        )


def scores_plot(stage: dict) -> Plot:
    """Attention scores of the first, middle and last head (KCLA, figure 7).

    Args:
        stage (dict): One of ``stages`` of a measurement, with scores.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """
    scores = stage['scores']
    count = len(scores['heads'])
    heads = sorted({0, count // 2, count - 1})
    inherits = any(x for x in scores['before']['mean'] if x is not None)

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(0.8 + 2.8 * len(heads), 3.4)
        figure.set_layout_engine('compressed')
        panels = figure.subplots(1, len(heads), squeeze=False)[0]
        for axes, head in zip(panels, heads):
            before = scores['before']['heads'][head] if inherits else None
            image = _draw_weights(
                axes, scores['heads'][head], stage['states'], theme, before
            )
            title = f'head {head}, s = {scores["temperatures"][head]:.2f}'
            if scores['limited'][head] > 0.005:
                title += f', {scores["limited"][head]:.0%} at the limit'
            axes.set_title(
                title,
                color=theme.ink,
                fontsize=9,
            )
        _colourbar(figure, image, list(panels), theme)

    return plot


def keys_plot(stages: dict) -> Plot:
    """Similarity of the keys of each two blocks of a stage (KCLA, figure 2).

    Args:
        stages (dict): ``stages`` of a measurement.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """
    shown = {name: stage['keys'] for name, stage in stages.items() if stage.get('keys')}
    # From 0 on where nothing is below, so that pictures compare
    low = 0 if min(np.min(keys['mean']) for keys in shown.values()) >= 0 else -1
    middle = (low + 1) / 2
    columns = len(shown) if len(shown) < 4 else math.ceil(len(shown) / 2)
    rows = math.ceil(len(shown) / columns)

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(0.8 + 2.8 * columns, 0.4 + 2.9 * rows)
        figure.set_layout_engine('compressed')
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (name, keys) in zip(panels, shown.items()):
            values, blocks = np.ma.array(keys['mean']), keys['blocks']
            image = axes.imshow(values, cmap=COLOURS, vmin=low, vmax=1)
            if len(blocks) <= 8:
                _number_cells(axes, values, 0, lambda value: value < middle)
            step = math.ceil(len(blocks) / 12)
            axes.set_xticks(range(0, len(blocks), step), blocks[::step])
            axes.set_yticks(range(0, len(blocks), step), blocks[::step])
            axes.set(xlabel='block', ylabel='block')
            axes.set_title(
                f'{plain_text(short_name(name))}: {keys["overall"]:.2f}',
                color=theme.ink,
                fontsize=9,
            )
        for axes in list(figure.axes)[len(shown) :]:
            axes.remove()
        _colourbar(figure, image, list(figure.axes), theme, 'cosine similarity')

    return plot


def heads_plot(stage: dict) -> Plot:
    """Attention weights of each head of a stage, all in one picture.

    Args:
        stage (dict): One of ``stages`` of a measurement, with maps.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """
    heads = [_array(rows) for rows in stage['maps']['heads']]
    count = len(stage['states'])
    columns = math.ceil(math.sqrt(len(heads)))
    rows = math.ceil(len(heads) / columns)
    # One image of all maps: as many axes would take a minute to lay out.
    gap = max(1, round(count / 8))
    pitch = count + gap
    canvas, gone = np.full((2, rows * pitch - gap, columns * pitch - gap), np.nan)
    for index, head in enumerate(heads):
        y, x = (pitch * i for i in divmod(index, columns))
        canvas[y : y + count, x : x + count] = head.filled(np.nan)
        gone[y : y + count, x : x + count][np.tri(count) > ~head.mask] = 1

    def plot(figure: Figure, theme: Theme) -> None:
        width = 2 * WIDTH
        figure.set_size_inches(width, 1 + (width - 1) * rows / columns)
        axes = figure.subplots()
        image = axes.imshow(canvas, cmap=COLOURS, vmin=0, vmax=1)
        axes.imshow(gone, cmap=ListedColormap([theme.faint]))
        for index in range(len(heads)):
            y, x = (pitch * i for i in divmod(index, columns))
            # The corner of what is not computed yet
            axes.text(
                x + count - 0.6,
                y - 0.4,
                f'{index}',
                ha='right',
                va='top',
                fontsize=max(4.5, 9 - columns / 2),
                color=theme.ink,
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set(xlabel='attended block', ylabel='asking block')
        _colourbar(figure, image, axes, theme)

    return plot


# -- similarities and contributions ----------------------------------------


def _series(axes: Axes, stages: dict, key: str, theme: Theme) -> None:
    """A line with deviations for each stage, pruned blocks marked."""
    shown = {name: s for name, s in stages.items() if s[key]}
    for index, (name, stage) in enumerate(shown.items()):
        values = stage[key]
        if isinstance(values, dict):
            x, y, std = (values[k] for k in ('blocks', 'mean', 'std'))
        else:
            x = [v['blocks'][-1] for v in values]
            y, std = ([v[k] for v in values] for k in ('mean', 'std'))
        colour = theme.lines[index % len(theme.lines)]
        # Beside each other where stages have blocks of the same index
        shift = 0.08 * (index - (len(shown) - 1) / 2)
        axes.errorbar(
            np.array(x) + shift,
            y,
            std,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=short_name(name).replace('$', r'\$'),
        )
        gone = [(a + shift, b) for a, b in zip(x, y) if stage['states'][a] in GONE]
        if gone:
            axes.plot(
                *zip(*gone),
                ls='none',
                marker='x',
                markersize=10,
                markeredgewidth=2,
                color=theme.pruned,
            )
    axes.grid(color=theme.faint, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes, 4)


def similarity_plot(stages: dict, key: str, histogram: Sequence[int] = None) -> Plot:
    """Cosine similarities over the blocks (MRLA, figure 2b).

    Args:
        stages (dict): ``stages`` of a measurement.
        key (str): ``'features'`` or ``'queries'``.
        histogram (Sequence[int], optional): Counts in equal bins from 0 to 1,
            drawn below. Defaults to None.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """
    absolute = 'absolute ' if key == 'queries' else ''

    def plot(figure: Figure, theme: Theme) -> None:
        panels = 1 + (histogram is not None)
        figure.set_size_inches(WIDTH, 2.8 * panels)
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        _series(axes[0], stages, key, theme)
        axes[0].set(
            xlabel='block (✕ pruned), compared with the one before',
            ylabel=f'{absolute}cosine similarity',
        )
        low = min(v['mean'] - v['std'] for s in stages.values() for v in s[key] or [])
        pad = 0.08 * max(1 - low, 1e-3)
        axes[0].set_ylim(low - pad, 1 + pad)
        if histogram is not None:
            edges = np.linspace(0, 1, len(histogram) + 1)
            share = np.array(histogram) / max(sum(histogram), 1)
            axes[1].bar(
                edges[:-1],
                share,
                width=edges[1],
                align='edge',
                color=theme.kept,
                edgecolor=theme.paper,
                linewidth=0.5,
            )
            axes[1].set(
                xlabel='absolute cosine similarity of queries',
                ylabel='share of heads and images',
                xlim=(0, 1),
            )

    return plot


def contributions_plot(stages: dict) -> Plot:
    """Effective contributions over the blocks (KCLA, figure 4).

    Args:
        stages (dict): ``stages`` of a measurement.

    Returns:
        Callable[[Figure, Theme], None]: Plot for
        :func:`mmela.visualization.drawing.draw`.
    """

    def plot(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _series(axes, stages, 'contributions', theme)
        axes.set(xlabel='block', ylabel='product of later |lambda_o|')
        axes.axhline(0, color=theme.ink, lw=0.6)

    return plot
