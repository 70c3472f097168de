"""Pictures of the measurements of :func:`mmela.analysis.measure_attention`."""

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

# Blue to yellow with even steps of lightness, readable without colour vision
COLOURS = 'cividis'
NOW = ('active', 'would be pruned')
GONE = ('pruned', 'value_only')


class Picture(NamedTuple):
    """A picture with its title and caption.

    Attributes:
        name (str): File name without suffix.
        title (str): What it shows.
        caption (str): How to read it, in one or two sentences.
        plot (Callable[[Figure, Theme], None]): Plot for
            :func:`mmela.visualization.drawing.draw`.
        detail (bool): Whether it is a detail, which reports leave out. Defaults to
            False.
        stage (str): For an attention map, the name of its stage. Defaults to ''.
    """

    name: str
    title: str
    caption: str
    plot: Plot
    detail: bool = False
    stage: str = ''


def attention_pictures(result: dict) -> Iterator[Picture]:
    """Iterate over all pictures of a measurement.

    Args:
        result (dict): See :func:`mmela.analysis.measure_attention`.

    Yields:
        Picture: The pictures, maps first.
    """
    stages = result['stages']
    for name, stage in stages.items():
        label, file = short_name(name), _file_name(name)
        if stage['maps']:
            yield Picture(
                f'maps_{file}',
                f'Attention weights of {label}',
                'Mean over images and heads. Each row is the querying block, each '
                'column the block it attends to; ✕ and hatching mark pruned '
                'attentions. Rows that look alike are redundant.',
                map_plot(stage),
                stage=name,
            )
        if stage['maps'] and len(stage['maps']['heads']) > 1:
            yield Picture(
                f'heads_{file}',
                f'Attention weights of {label} by head',
                'Mean over images, one map per head, with rows and columns as in the '
                'mean map; grey marks pruned attentions.',
                heads_plot(stage),
                True,
            )
        if stage.get('scores'):
            yield Picture(
                f'scores_{file}',
                f'Attention scores of {label} by head',
                'Share of each block in the retrieved features, averaged over images, '
                'for the first, the middle and the last head. A larger s favours keys '
                'with a large norm. "Before" is the memory of the previous stage. "At '
                'the limit" are weights whose exponent is cut to 10, so that these '
                'blocks weigh the same.',
                scores_plot(stage),
            )
    if result['decision'] and any('active' in s['states'] for s in stages.values()):
        decision = PruningDecision.from_dict(result['decision'])
        yield Picture(
            'kl',
            'KL divergence of adjacent active attentions',
            'How much the weights of an attention differ from those of the previous '
            'active one in its stage. Hatched: the policy would prune it now. Only '
            '✕: it is already pruned.',
            kl_plot(decision, NOW),
        )
        if any(layer.mapped is not None for layer in decision.layers):
            yield Picture(
                'policy',
                'Divergences mapped by the policy',
                'Attentions below the threshold are redundant. Values above the '
                'quantile are not mapped and not shown.',
                mapping_plot(decision, NOW),
            )
    if any(stage['features'] for stage in stages.values()):
        yield Picture(
            'features',
            'Similarity of the features of adjacent blocks',
            'Cosine similarity between the outputs of a block and the previous one, '
            'with attention: mean and standard deviation over images.',
            similarity_plot(stages, 'features'),
        )
    if any(stage['queries'] for stage in stages.values()):
        yield Picture(
            'queries',
            'Similarity of the queries of adjacent attentions',
            'Absolute cosine similarity between the queries of an active attention '
            'and the previous active one, averaged over heads: mean and standard '
            'deviation over images. Below, the distribution of the values, without '
            'the first attention of each stage.',
            similarity_plot(stages, 'queries', result['histogram']),
        )
    if any(stage.get('keys') for stage in stages.values()):
        yield Picture(
            'keys',
            'Similarity of the keys of the blocks',
            'Cosine similarity between the keys of every two blocks of a stage, '
            'averaged over heads and images; above each map, the mean over all pairs. '
            'Keys with similarity 1 differ only in length; a zero key gives 0.',
            keys_plot(stages),
        )
    if any(stage['contributions'] for stage in stages.values()):
        yield Picture(
            'contributions',
            'Contribution of each layer to the last output of its stage',
            'Product of |lambda_o| of the later layers: mean and standard '
            'deviation over channels. 1 means the full contribution.',
            contributions_plot(stages),
        )


def _file_name(name: str) -> str:
    return re.sub(r'\W+', '_', short_name(name))


# -- attention maps --------------------------------------------------------


def _array(rows: Sequence[Sequence[float]]) -> np.ma.MaskedArray:
    """Convert weights, with None for missing ones, to a masked array."""
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
    """Hatch rows without attention and columns that cannot be attended to."""
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
        # Other layouts push the labels of such a wide map out of the picture
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
    """Draw the weights of a stage, with one column per block.

    ``before`` adds a column for the memory of the previous stage.
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
    """Write the values of a map into its cells; ``left`` is the first column."""
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
    # Start at 0 if possible, so that pictures are comparable
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
    """Attention weights of all heads of a stage in one picture.

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
    # A single image, because one axes per map would take a minute to lay out
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
            # In the empty corner above the diagonal
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
    """Draw a line with error bars for each stage, and mark pruned blocks."""
    shown = {name: s for name, s in stages.items() if s[key]}
    for index, (name, stage) in enumerate(shown.items()):
        values = stage[key]
        if isinstance(values, dict):
            x, y, std = (values[k] for k in ('blocks', 'mean', 'std'))
        else:
            x = [v['blocks'][-1] for v in values]
            y, std = ([v[k] for v in values] for k in ('mean', 'std'))
        colour = theme.lines[index % len(theme.lines)]
        # Offset stages, since their blocks have the same indices
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
            xlabel='block (✕ pruned), compared with the previous one',
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
