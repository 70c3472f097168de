"""Draw pictures of a run for a talk or a README.

kl.png: KL divergence of each layer attention from the previous one, the pruned
attentions and the threshold of the policy, at the pruning that removed most.
attention_maps.png: attention weights of the stage that changed most between the
first and the last measurement of mmela layer-attention in the work directory.
Both are also drawn for dark pages, *_dark.png.
before_after.jpg: detections before the first pruning and at the end, beside the
annotated objects, if mmela report has measured them.

Example:
  mmela pictures work_dirs/demo docs/pictures
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Sequence

from mmela_light.arguments import tool_parser

if TYPE_CHECKING:
    from ..visualization.drawing import Plot


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('pictures', __doc__)
    parser.add_argument(
        'work_dir', metavar='WORK_DIR', help='work directory of the run'
    )
    parser.add_argument(
        '--images',
        nargs='+',
        type=int,
        default=[1, 2],
        metavar='N',
        help='rows of detections, numbered as in the report (default: 1 2)',
    )
    parser.add_argument('out', metavar='OUT', help='folder for the pictures')
    return parser.parse_args(argv)


def divergences(work_dir: Path) -> 'Plot':
    """Plot the KL divergences at the pruning that removed most attentions.

    Raises:
        OSError: If ``pruning.json`` cannot be read.
        ValueError: If the file is invalid, or nothing was pruned.
    """
    from ..pruning import PruningReport
    from ..visualization.decision_plots import kl_plot

    path = work_dir / 'pruning.json'
    decision = max(
        PruningReport.read(path).decisions, key=lambda d: len(d.pruned), default=None
    )
    if decision is None or not decision.pruned:
        raise ValueError(f'{path} has no decision that pruned anything')
    return kl_plot(decision)


def changed_stage(before: Dict[str, dict], after: Dict[str, dict]) -> str:
    """Name of the stage with maps that lost most attentions.

    In a tie, it is the one with the most blocks.

    Raises:
        ValueError: If no stage has maps in both measurements.
    """
    names = [n for n in before if before[n]['maps'] and after.get(n, {}).get('maps')]
    if not names:
        raise ValueError('no stage has attention maps in both measurements')

    def lost(name):
        states = before[name]['states'], after[name]['states']
        count = [s.count('active') for s in states]
        return count[0] - count[1], len(states[0])

    return max(names, key=lost)


def attention_maps(work_dir: Path) -> 'Plot':
    """Plot the maps of one stage in the first and in the last measurement.

    Raises:
        ValueError: If there are fewer than two measurements, or they share no stage
            with maps.
    """
    from ..analysis.attention_plots import map_pair_plot
    from ..analysis.report import read_analyses
    from ..visualization.drawing import short_name

    analyses = read_analyses(work_dir)
    if len(analyses) < 2:
        raise ValueError(
            f'{work_dir} has {len(analyses)} layer_attention.json, but two are '
            'needed; make them with mmela layer-attention'
        )
    (_, first, _, before), (_, last, _, after) = analyses[0], analyses[-1]
    stage = changed_stage(before['stages'], after['stages'])
    panels = []
    for name, result in ((first, before), (last, after)):
        states = result['stages'][stage]['states']
        title = (
            f'{short_name(stage)}, {name.replace("_", " ")}: '
            f'{states.count("active")} of {len(states)} active'
        )
        panels.append((title, result['stages'][stage]))
    return map_pair_plot(panels)


def detections(work_dir: Path, path: Path, rows: Sequence[int]) -> None:
    """Draw detections before and after as a JPEG.

    Raises:
        ValueError: If a row does not exist.
    """
    from matplotlib.figure import Figure

    from ..analysis.before_after_plots import detections_plot, read_before_after
    from ..files import replacing
    from ..visualization.drawing import LIGHT

    result = read_before_after(work_dir)
    number = len(result['shown'])
    if not set(rows) <= set(range(1, number + 1)):
        raise ValueError(f'--images={list(rows)}: allowed are 1 to {number}')
    plot = detections_plot(work_dir, result, [row - 1 for row in rows])
    figure = Figure(dpi=100, facecolor=LIGHT.paper, layout='constrained')
    plot(figure, LIGHT)
    with replacing(path) as temporary:
        figure.savefig(temporary, pil_kwargs=dict(quality=85, optimize=True))


def main(argv=None) -> None:
    args = parse_args(argv)
    from ..analysis.before_after_plots import read_before_after
    from ..command_line import one_line
    from ..visualization.drawing import draw

    work_dir, out = Path(args.work_dir), Path(args.out)
    try:
        plots = dict(kl=divergences(work_dir), attention_maps=attention_maps(work_dir))
        out.mkdir(parents=True, exist_ok=True)
        for name, plot in plots.items():
            for path in draw(plot, out / f'{name}.png'):
                print(path)
        if read_before_after(work_dir).get('kind') == 'detections':
            path = out / 'before_after.jpg'
            detections(work_dir, path, args.images)
            print(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f'error: {work_dir}: {one_line(error)}') from error
