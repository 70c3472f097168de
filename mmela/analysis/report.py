import base64
import re
from pathlib import Path
from typing import Callable, List, Optional, Tuple, Union

from ..command_line import printable
from ..engine.tables import decision_table
from ..files import check_target, write_text
from ..pruning.record import check_name
from ..templates import template
from ..visualization.decision_plots import kl_plot, mapping_plot
from ..visualization.drawing import Plot, draw, short_name
from .attention_plots import attention_pictures
from .before_after import COLORS, FOLDER, THRESHOLD
from .before_after_plots import (
    CURVES,
    SIDES,
    curves_plot,
    read_before_after,
    stands_for,
)
from .complexity import backbone_complexity
from .records import Measurement, read_measurement
from .run_plots import loss_plot, metric_groups, metrics_plot, timeline_plot
from .work_dir import Run

# Exceptions that drawing inconsistent numbers may raise
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def make_report(work_dir: Union[str, Path], out: Union[str, Path, None] = None) -> Path:
    """Write a self-contained page on a run, and its pictures.

    It includes the measurements of ``mmela layer-attention`` on checkpoints of the run,
    if a ``layer_attention.json`` is in the work directory or up to two folders below,
    and the results of :func:`~mmela.analysis.before_after.measure_before_after`.

    Args:
        work_dir (str | Path): Work directory of an mmengine runner, with or
            without the pruning hook.
        out (str | Path, optional): The page. Defaults to ``report.html`` in
            the work directory.

    Returns:
        Path: The page. The pictures are also in ``pictures/`` in the work directory,
        each for a light and a dark page (``*_dark.png``).

    Raises:
        FileNotFoundError: If the directory does not exist or has no log of scalars.
        NotADirectoryError: If it is a file.
        NotWritten: If ``out`` is a folder, or in one that does not exist.
        ValueError: If a log, ``pruning.json``, ``layer_attention.json`` or
            ``before_after.json`` is invalid.
    """
    run = Run(work_dir)
    path = run.work_dir / 'report.html' if out is None else Path(out)
    check_target(path)
    analyses = read_analyses(run.work_dir)
    comparison = read_before_after(run.work_dir)
    pictures = run.work_dir / 'pictures'
    pictures.mkdir(exist_ok=True)

    def inline(plot: Plot, name: str) -> Tuple[str, ...]:
        return tuple(_embedded(p) for p in draw(plot, pictures / f'{name}.png'))

    steps = run.step_times()
    decisions = []
    for decision, before, after in zip(run.decisions, steps, steps[1:]):
        name = f'{decision.unit}_{decision.window[1]}'
        curve = None
        if any(layer.mapped is not None for layer in decision.layers):
            curve = inline(mapping_plot(decision), f'mapping_{name}')
        bars = inline(kl_plot(decision), f'kl_{name}')
        decisions.append((decision, bars, curve, before, after))
    shown, maps = [], {}
    for source, name, prefix, result in analyses:
        drawn = []
        for picture in attention_pictures(result):
            if picture.detail:
                continue
            try:
                pair = inline(picture.plot, f'{prefix}_{picture.name}')
            except _MALFORMED as error:
                raise ValueError(f'{source} cannot be drawn: {error!r}') from error
            if len(analyses) > 1 and picture.stage:
                # Side by side, for comparison
                states = result['stages'][picture.stage]['states']
                maps.setdefault(picture.name, []).append(
                    (name, picture, pair, states.count('active'), len(states))
                )
            else:
                drawn.append((picture.title, picture.caption, pair))
        shown.append((name, result, drawn))
    try:
        detections = _detections(run.work_dir, comparison, inline)
    except (*_MALFORMED, OSError) as error:
        raise ValueError(
            f'{run.work_dir / FOLDER} cannot be shown: {error!r}'
        ) from error
    complexity, size, no_complexity = backbone_complexity(run)
    last_step = max(run.metrics, default=None)
    # Before rendering, because it may add a note
    parameters = run.parameters()
    page = template(
        'report.html',
        short=short_name,
        call=as_call,
        stands_for=stands_for,
        of=lambda label, names: names[label],
    ).render(
        title=Path(run.config_name).stem or run.work_dir.resolve().name,
        run=run,
        parameters=parameters,
        **detections,
        complexity=complexity,
        size=size,
        no_complexity=no_complexity,
        analyses=shown,
        maps=list(maps.values()),
        steps=[step for step in steps if step.times],
        last_step=last_step,
        last=run.metrics.get(last_step, {}),
        decisions=decisions,
        metrics_picture=inline(metrics_plot(run), 'metrics')
        if metric_groups(run)
        else None,
        loss_picture=inline(loss_plot(run), 'loss') if run.losses else None,
        timeline_picture=inline(timeline_plot(run), 'timeline')
        if run.decisions
        else None,
    )
    write_text(path, page)
    return path


def as_call(cfg: dict) -> str:
    """Write a config as a call, ``EBQM(gamma=0.5, mu=0.2)``."""
    arguments = ', '.join(
        f'{k}={v!r}' for k, v in cfg.items() if k != 'type' and v is not None
    )
    return f'{cfg.get("type")}({arguments})'


def _detections(work_dir: Path, comparison: dict, inline: Callable) -> dict:
    """Prepare detections or classes before and after for the page."""
    measured = comparison.get('sides', {})
    sides = {side: measured[side] for side in SIDES if side in measured}
    for entry in comparison['shown'] if comparison else ():
        if comparison['kind'] == 'detections':
            entry['sources'] = {
                side: _embedded(work_dir / FOLDER / check_name(name))
                for side, name in entry['pictures'].items()
            }
        else:
            name = check_name(entry['picture'])
            entry['source'] = _embedded(work_dir / FOLDER / name)
    values = [{x['label']: x for x in side['per_class']} for side in sides.values()]
    labels = sorted({label for some in values for label in some})
    per_class = [
        (
            comparison['classes'][label],
            next(some[label]['objects'] for some in values if label in some),
            [some[label]['value'] if label in some else None for some in values],
        )
        for label in labels
    ]
    if per_class:
        counts = sum(row[1] for row in per_class)
        means = [side['mean'] for side in sides.values()]
        per_class.insert(0, ('all', counts, means))
    curves = None
    if per_class and comparison['kind'] == 'detections':
        curves = inline(curves_plot(comparison), 'precision_recall')
    return dict(
        comparison=comparison,
        sides=sides,
        per_class=per_class,
        curves=curves,
        colors=COLORS,
        threshold=THRESHOLD,
        most=CURVES,
    )


def _embedded(path: Path) -> str:
    """Encode a picture as a data URL, for a page that opens offline."""
    kind = 'png' if path.suffix == '.png' else 'jpeg'
    return f'data:image/{kind};base64,' + base64.b64encode(path.read_bytes()).decode()


def read_analyses(work_dir: Path) -> List[Tuple[Path, str, str, Measurement]]:
    """Read the measurements in a work directory.

    Returns:
        list[tuple[Path, str, str, Measurement]]: Path, name of the checkpoint, prefix
        for file names and content of each ``layer_attention.json``, in the order of the
        numbers in the folder names.

    Raises:
        ValueError: If a file is invalid.
    """
    paths = []
    for pattern in ('', '*/', '*/*/'):
        paths += work_dir.glob(f'{pattern}layer_attention.json')
    paths.sort(
        key=lambda path: [
            int(part) if part.isdigit() else part
            for part in re.split(r'(\d+)', path.parent.as_posix())
        ]
    )
    analyses = []
    for index, path in enumerate(paths):
        result = read_measurement(path)
        name = Path(result['checkpoint']).stem
        analyses.append((path, name, f'attention_{index}', result))
    return analyses


def summarize(work_dir: Union[str, Path], report: Union[str, Path, None] = None) -> str:
    """Summarize a run for a terminal.

    Args:
        work_dir (str | Path): Work directory of an mmengine runner.
        report (str | Path, optional): The report page. Defaults to
            ``report.html`` in the work directory.

    Returns:
        str: The pruning decisions with their KL tables, the metrics of the best and
        the last epoch, and the paths of checkpoint, report and pictures.

    Raises:
        FileNotFoundError: If the directory does not exist or has no log of scalars.
        NotADirectoryError: If it is a file.
        ValueError: If a log or ``pruning.json`` is invalid.
    """
    run = Run(work_dir)
    lines: List[str] = []
    for decision in run.decisions:
        pruned = ', '.join(map(short_name, decision.pruned)) or 'nothing'
        lines += [
            f'After {decision.unit} {decision.window[1]}: '
            f'{len(decision.layers)} -> {len(decision.active)} active '
            f'attentions; pruned: {pruned}',
            decision_table(decision.layers),
            '',
        ]
    if not run.decisions:
        lines += ['This run has no pruning decision.', '']
    lines += _metric_lines(run)

    report = run.work_dir / 'report.html' if report is None else Path(report)
    files = [
        ('Checkpoint', run.checkpoint),
        ('Best checkpoint', run.best_checkpoint),
        ('Decisions', run.work_dir / 'pruning.json'),
        ('Attention maps', run.work_dir / 'layer_attention'),
        ('Pictures', run.work_dir / 'pictures'),
        ('Report', report),
    ]
    lines += [
        f'{label + ":":<17}{path}'
        for label, path in files
        if path is not None and path.exists()
    ]
    return '\n'.join(map(printable, '\n'.join(lines).split('\n')))


def _metric_lines(run: Run) -> List[str]:
    """Format the main metrics of the best and of the last epoch."""
    if not run.metrics:
        return ['There are no validation metrics.']
    names = [name for group in metric_groups(run).values() for name in group]
    last = max(run.metrics)
    # The metric of the best checkpoint, or else the first metric
    file = run.best_checkpoint.name if run.best_checkpoint else ''
    chosen: Optional[str] = max(
        (n for n in names if file.startswith(f'best_{n.replace("/", "_")}_')),
        key=len,
        default=names[0] if names else None,
    )
    best = run.best(chosen) if chosen else None
    steps = {last: 'last'}
    if best is not None:
        mark = f'best {chosen}'
        steps[best[0]] = f'{mark}, last' if best[0] == last else mark
    lines = []
    for step in sorted(steps):
        values = '  '.join(
            f'{name} {run.metrics[step][name]:.4g}'
            for name in names
            if name in run.metrics[step]
        )
        lines.append(f'{run.unit.capitalize()} {step}: {values} ({steps[step]})')
    return lines
