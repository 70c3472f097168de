"""Pictures of predictions before the first pruning and at the end."""

from pathlib import Path
from typing import List, Sequence, Union

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..visualization.drawing import WIDTH, Plot, Theme, plain_text
from .before_after import FOLDER
from .records import BeforeAfter, read_record

SIDES = ('before', 'after')
# Maximum number of classes with a curve each; more would be too small to read
CURVES = 7


def read_before_after(work_dir: Union[str, Path]) -> Union[BeforeAfter, dict]:
    """Read the result of :func:`~mmela.analysis.before_after.measure_before_after`.

    Args:
        work_dir (str | Path): Work directory of a run.

    Returns:
        BeforeAfter | dict: Content of ``before_after.json``; empty if it does not
        exist.

    Raises:
        ValueError: If the file is invalid.
    """
    path = Path(work_dir) / FOLDER / f'{FOLDER}.json'
    if not path.is_file():
        return {}
    return read_record(path, BeforeAfter, 'tools/analysis/report.py')


def stands_for(side: dict) -> str:
    """Describe the network on one side of the comparison."""
    when = 'epoch', side['epoch']
    if not side['epoch']:
        when = 'iteration', side['iteration']
    return f'{when[0]} {when[1]}, {side["active"]} of {side["attentions"]} attentions'


def curves_plot(result: dict) -> Plot:
    """Precision over recall at IoU 0.5, for all classes together and for each one.

    Args:
        result (dict): See :func:`read_before_after`.

    Returns:
        Callable[[Figure, Theme], None]: Plot for :func:`draw`.
    """
    sides = {k: result['sides'][k] for k in SIDES if k in result['sides']}
    per_class = {
        side: {x['label']: x for x in values['per_class']}
        for side, values in sides.items()
    }
    labels = list(per_class['after'])
    if len(labels) > CURVES:
        labels.sort(key=lambda i: (-per_class['after'][i]['objects'], i))
        labels = sorted(labels[:CURVES])
    recall = np.linspace(0, 1, 101)

    def plot(figure: Figure, theme: Theme) -> None:
        rows = len(labels) // 2 + 1
        figure.set_size_inches(WIDTH, 1.6 * rows + 0.4)
        panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(labels) + 1 :]:
            axes.set_visible(False)
        panels.flat[len(labels)].xaxis.set_tick_params(labelbottom=True)
        panels.flat[len(labels) - 1].xaxis.set_tick_params(labelbottom=True)
        for axes, label in zip(panels.flat, [None, *labels]):
            for side, color, style in zip(
                SIDES, (theme.pruned, theme.kept), ('--', '-')
            ):
                if side not in sides:
                    continue
                if label is None:
                    curve = sides[side]['curves']['0.50']
                else:
                    curve = per_class[side][label]['curve']
                axes.plot(recall, curve, color=color, ls=style, lw=1.4, label=side)
            title = 'all classes' if label is None else result['classes'][label]
            axes.set_title(plain_text(title), fontsize=9, color=theme.ink, pad=3)
            axes.set(xlim=(0, 1), ylim=(0, 1.03))
            axes.grid(color=theme.faint, linewidth=0.6)
        figure.supxlabel('recall', fontsize=9, color=theme.ink)
        figure.supylabel('precision', fontsize=9, color=theme.ink)
        if len(sides) > 1:
            handles, names = panels[0, 0].get_legend_handles_labels()
            figure.legend(
                handles,
                names,
                loc='outside upper right',
                ncols=2,
                frameon=False,
                fontsize=8,
                labelcolor=theme.ink,
            )

    return plot


def detections_plot(
    work_dir: Union[str, Path], result: dict, rows: Sequence[int]
) -> Plot:
    """Ground truth and detections side by side, for a README.

    Args:
        work_dir (str | Path): Work directory of the run.
        result (dict): See :func:`read_before_after`; it must be for a detector.
        rows (Sequence[int]): Indices of the shown images to draw.

    Returns:
        Callable[[Figure, Theme], None]: Plot, 12 inches wide.
    """
    titles = ['Ground truth']
    for side in SIDES:
        if side in result['sides']:
            name = 'Before pruning' if side == 'before' else 'At the end'
            titles.append(f'{name}: {stands_for(result["sides"][side])}')
    images: List[List[np.ndarray]] = []
    for row in rows:
        pictures = result['shown'][row]['pictures'].values()
        paths = [Path(work_dir) / FOLDER / name for name in pictures]
        images.append([np.asarray(Image.open(path)) for path in paths])

    def plot(figure: Figure, theme: Theme) -> None:
        ratio = sum(row[0].shape[0] / row[0].shape[1] for row in images)
        figure.set_size_inches(12, 12 * ratio / len(titles) + 0.25)
        panels = figure.subplots(len(images), len(titles), squeeze=False)
        for row, pictures in zip(panels, images):
            for axes, picture in zip(row, pictures):
                axes.imshow(picture, interpolation='lanczos')
                axes.set_axis_off()
        for axes, title in zip(panels[0], titles):
            axes.set_title(title, fontsize=11, color=theme.ink, pad=4)

    return plot
