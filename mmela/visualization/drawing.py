"""Draw pictures in a common style for light and for dark pages."""

import os
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Callable, Dict, Optional, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ..files import replacing

# Width in inches, close to that of a phone
WIDTH = 4.6
MARKERS = 'osD^vP*X'


@dataclass(frozen=True)
class Theme:
    """Colours that are distinct without colour vision (Okabe and Ito).

    Attributes:
        paper (str): Background of the page.
        ink (str): Text and axes.
        faint (str): Grid and shading.
        kept (str): Kept attentions.
        pruned (str): Pruned attentions.
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
        plot (Callable[[Figure, Theme], None]): Function that draws on a figure.
        path (Path): Path of the light picture, ``NAME.png``. The dark one becomes
            ``NAME_dark.png``.

    Returns:
        tuple[Path, Path]: Both paths.
    """
    paths = path, path.with_name(f'{path.stem}_dark.png')
    for theme, target in zip((LIGHT, DARK), paths):
        image = Image.fromarray(render(plot, theme))
        # A third of the file size, without a visible difference
        image = image.quantize(128, method=Image.Quantize.MEDIANCUT)
        with replacing(target) as temporary:
            image.save(temporary, optimize=True)
    return paths


def render(plot: Plot, theme: Theme = LIGHT) -> np.ndarray:
    """Draw a picture into memory.

    Args:
        plot (Callable[[Figure, Theme], None]): Function that draws on a figure.
        theme (Theme): The colours. Defaults to those of a light page.

    Returns:
        ndarray: The picture, (h, w, 3), RGB from 0 to 255.
    """
    figure = Figure(
        figsize=(WIDTH, 3), dpi=160, facecolor=theme.paper, layout='constrained'
    )
    canvas = FigureCanvasAgg(figure)
    plot(figure, theme)
    for axes in figure.axes:
        _dress(axes, theme)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _dress(axes: Axes, theme: Theme) -> None:
    """Apply a theme to the parts of a plot that have default colours."""
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


def plain_text(value: str) -> str:
    """Escape dollar signs, which matplotlib reads as mathematics."""
    return value.replace('$', r'\$')


def legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above the axes, where it covers nothing."""
    axes.legend(
        loc='lower left',
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.8,
        columnspacing=1.2,
    )


def draw_over_image(
    path: os.PathLike,
    image: np.ndarray,
    columns: Dict[str, Dict[str, np.ndarray]],
    notes: Dict[str, Dict[str, str]],
    title: str,
    box: Optional[Sequence[float]] = None,
) -> None:
    """Draw an image and maps over it to a PNG file.

    Args:
        path (PathLike): The PNG file.
        image (ndarray): The image, (h, w, 3), RGB from 0 to 1.
        columns (dict[str, dict[str, ndarray]]): Maps of each network, (h', w') from 0
            to 1, by the heading of its column and the name of the row.
        notes (dict[str, dict[str, str]]): Text below each map, by the same keys.
        title (str): Heading of the whole picture.
        box (Sequence[float], optional): Left, top, width and height in pixels of a
            red box. Defaults to None.
    """
    rows = list(next(iter(columns.values())))
    height, width = image.shape[:2]
    size = 2.6
    figure = Figure(
        figsize=(
            size * (1 + len(columns)) + 0.3,
            (size * height / width + 0.35) * len(rows) + 0.7,
        ),
        dpi=120,
        layout='constrained',
    )
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(plain_text(title), fontsize=10)
    panels = figure.subplots(len(rows), 1 + len(columns), squeeze=False)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    for row, label in enumerate(rows):
        panels[row, 0].set_ylabel(label, fontsize=10)
        for column, (name, maps) in enumerate(columns.items(), 1):
            axes = panels[row, column]
            axes.imshow(
                maps[label], cmap='viridis', vmin=0, vmax=1, extent=extent, zorder=1
            )
            axes.set_xlabel(notes[name].get(label, ''), fontsize=9)
            if row == 0:
                lines = [fill(line, 34) for line in name.split('\n')]
                axes.set_title(plain_text('\n'.join(lines)), fontsize=9)
    # Grey, so that all colours come from the maps
    grey = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    for axes in panels.flat:
        over = bool(axes.images)
        axes.imshow(
            grey if over else image,
            alpha=0.45 if over else 1,
            extent=extent,
            zorder=2,
        )
        axes.set(xticks=[], yticks=[])
        if box is not None:
            axes.add_patch(
                Rectangle(
                    (box[0] - 0.5, box[1] - 0.5),
                    *box[2:],
                    fill=False,
                    edgecolor='red',
                    linewidth=1.5,
                    zorder=3,
                )
            )
    with replacing(path) as temporary:
        canvas.print_png(str(temporary))


def short_name(name: str) -> str:
    """Shorten ``backbone.layer1.0.layer_attn`` to ``layer1.0``."""
    if name.endswith('.layer_attn'):
        name = name[: -len('.layer_attn')]
    return name[len('backbone.') :] if name.startswith('backbone.') else name
