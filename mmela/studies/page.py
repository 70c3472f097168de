"""Write the page of a study: the question, the runs and the results."""

import html
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, List, Optional, Sequence, Tuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmela_light.command import PACKAGE

from ..command_line import one_line
from ..files import write_text
from ..templates import template
from ..visualization.drawing import MARKERS, WIDTH, Theme, draw, plain_text
from .plan import duration
from .results import Row, agreements, difference, finals, spread
from .run import Job
from .study import Study, Variant

NONE = '–'
_LEARNED = {True: 'yes', False: 'no', None: NONE}


def write_page(
    study: Study,
    jobs: Sequence[Job],
    runs: Sequence[Row],
    layers: Sequence[Row],
    tables: Sequence[Path],
    path: Path,
    command: str,
) -> List[Path]:
    """Write the page and its picture.

    Args:
        study (Study): The study; its texts are written by hand, in Markdown.
        jobs (Sequence[Job]): The runs.
        runs (Sequence[dict]): A row for each run.
        layers (Sequence[dict]): A row for each layer and decision.
        tables (Sequence[Path]): The tables beside the page.
        path (Path): The page, ``NAME.md``.
        command (str): The command that ran the study.

    Returns:
        list[Path]: The written files.
    """
    shown = [v for v in study.variants.values() if not v.hidden]
    pictures: Tuple[Path, ...] = ()
    if any(row['final'] is not None for row in runs):
        pictures = draw(_plot(study, shown, runs), path.with_suffix('.png'))
    agreement, masks = _pruning(shown, runs, layers)
    days = sorted(
        time.strftime('%Y-%m-%d', time.gmtime(attempt.started))
        for job in jobs
        for attempt in job.record.attempts
    )
    page = template('study.md', cell=_cell, portable=portable).render(
        study=study,
        missing=_missing(study, runs),
        results=_table(shown, runs),
        pictures=pictures,
        comparisons=_comparisons(study, runs),
        seeds=_seeds(study, shown, runs),
        agreement=agreement,
        masks=masks,
        command=command,
        variants=_variants(study),
        machines=_machines(runs),
        days=days,
        changed={
            job.name: escape(changes[0]) for job in jobs if (changes := job.changes())
        },
        tables=tables,
    )
    write_text(path, page)
    return [path, *pictures]


def _missing(study: Study, runs: Sequence[Row]) -> List[str]:
    return [
        f'{row["variant"]} seed {row["seed"]} '
        f'({"no such metric" if row["status"] == "done" else row["status"]})'
        for row in runs
        if row['final'] is None and not study.variants[row['variant']].hidden
    ]


def _table(shown: Sequence[Variant], runs: Sequence[Row]) -> str:
    paper = any(v.paper is not None for v in shown)
    digits = _digits(runs)
    head = ['variant', 'n', 'mean', 'SD', '95 % CI', *(['paper'] if paper else [])]
    head += ['best', 'active attentions', 'step time (s)', 'memory (MB)', 'time']
    rows = []
    for variant in shown:
        s = spread(list(finals(runs, variant.name).values()))
        rows.append([variant.label, str(s.n), _number(s.mean, digits)])
        rows[-1] += [_number(s.deviation, digits), _interval(s.low, s.high, digits)]
        if paper:
            rows[-1].append(NONE if variant.paper is None else f'{variant.paper:g}')

        def mean(key: str, digits: int, name: str = variant.name) -> str:
            return _number(spread(list(finals(runs, name, key).values())).mean, digits)

        wall = spread(list(finals(runs, variant.name, 'wall_time').values())).mean
        active = mean('active', 1)
        active = active[:-2] if active.endswith('.0') else active
        times = list(finals(runs, variant.name, 'step_time').values())
        rows[-1] += [mean('best', digits), active, _with_range(times, 3)]
        rows[-1] += [mean('memory', 0), NONE if wall is None else duration(wall)]
    # Drop empty columns: a CPU logs no memory, and not every metric has a best value
    known = [
        i
        for i, name in enumerate(head)
        if name not in ('best', 'memory (MB)') or any(row[i] != NONE for row in rows)
    ]
    head, *rows = ([row[i] for i in known] for row in (head, *rows))
    return _markdown(head, rows)


def _with_range(values: Sequence[float], digits: int) -> str:
    """Format the mean of values, with the range if there are several."""
    text = _number(spread(values).mean, digits)
    if len(values) > 1:
        text += f' ({_number(min(values), digits)} to {_number(max(values), digits)})'
    return text


def _comparisons(study: Study, runs: Sequence[Row]) -> str:
    digits, rows = _digits(runs), []
    for name, against in study.compare:
        s = difference(runs, name, against)
        labels = [study.variants[key].label for key in (name, against)]
        rows.append([' − '.join(labels), str(s.n), _number(s.mean, digits, '+')])
        rows[-1] += [_interval(s.low, s.high, digits), _number(s.p, 3)]
    return _markdown(['difference', 'seeds', 'mean', '95 % CI', 'p'], rows)


def _seeds(study: Study, shown: Sequence[Variant], runs: Sequence[Row]) -> str:
    digits, rows = _digits(runs), []
    for variant in shown:
        values = finals(runs, variant.name)
        cells = [_number(values.get(seed), digits) for seed in study.seeds]
        rows.append([variant.label, *cells])
    return _markdown(['variant', *(f'seed {seed}' for seed in study.seeds)], rows)


def _pruning(
    shown: Sequence[Variant], runs: Sequence[Row], layers: Sequence[Row]
) -> Tuple[str, str]:
    """Tables of the agreement between seeds, and of the pruned attentions."""
    rows, masks = [], []
    for variant in shown:
        for a in agreements(layers, variant.name):
            rows.append([variant.label, a.window, _list(a.pruned), _list(a.candidates)])
            rows[-1] += [_number(a.jaccard, 2), _number(a.chance, 2)]
            rows[-1].append(', '.join(f'{c:.2f}' for c in a.correlation) or NONE)
            rows[-1].append(_list([_LEARNED[x] for x in a.learned]))
        for row in runs:
            if row['variant'] == variant.name and row['pruned']:
                masks.append([variant.label, str(row['seed']), escape(row['pruned'])])
    head = ['variant', 'window', 'pruned', 'of', 'Jaccard', 'by chance']
    return (
        _markdown([*head, 'correlation with the baseline', 'learned'], rows),
        _markdown(['variant', 'seed', 'pruned'], masks),
    )


def _variants(study: Study) -> str:
    rows = []
    for variant in study.variants.values():
        start = variant.start
        text = f'{start.how} {start.checkpoint} of {start.variant}' if start else ''
        options = ' '.join(f'`{option}`' for option in variant.options)
        rows.append([variant.name, f'`{portable(variant.config)}`', options, text])
    return _markdown(['variant', 'config', 'options', 'starts from'], rows)


def _machines(runs: Sequence[Row]) -> Counter:
    return Counter(
        escape(
            f'{row["cpu"]}, {row["cores"]} cores, {row["gpu"] or "no GPU"}, torch '
            f'{row["torch"]}, mmela {row["mmela"]} '
            f'({row["revision"] or "no revision"}), {row["threads"]} thread'
            + 's'
            * (row['threads'] != 1)
        )
        for row in runs
        if row['cpu']
    )


def _plot(study: Study, shown: Sequence[Variant], runs: Sequence[Row]):
    """Plot a dot for each seed, and the mean with its confidence interval."""

    def plot(figure: Figure, theme: Theme) -> None:
        figure.set_size_inches(WIDTH, 0.8 + 0.42 * len(shown))
        axes = figure.subplots()
        for place, variant in enumerate(shown):
            values = finals(runs, variant.name)
            s = spread(list(values.values()))
            if s.low is not None and s.high is not None:
                axes.plot([s.low, s.high], [place] * 2, color=theme.ink, linewidth=1.4)
            if s.mean is not None:
                axes.plot(s.mean, place, '|', color=theme.ink, markersize=13, mew=2)
            for index, seed in enumerate(study.seeds):
                if seed in values:
                    axes.plot(
                        values[seed],
                        place + 0.2,
                        MARKERS[index % len(MARKERS)],
                        color=theme.lines[index % len(theme.lines)],
                        markersize=4.5,
                        linestyle='none',
                    )
        axes.set_yticks(range(len(shown)), [plain_text(v.label) for v in shown])
        axes.set_ylim(len(shown) - 0.6, -0.4)
        axes.set_xlabel(plain_text(study.metric))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis='x', color=theme.faint, linewidth=0.6)

    return plot


def portable(path: Path) -> str:
    """A path relative to the checkout; only the file name outside of it."""
    for root in (PACKAGE.parent, PACKAGE / '.mim'):
        try:
            return path.resolve().relative_to(root.resolve()).as_posix()
        except ValueError:
            continue
    return path.name


def _digits(runs: Iterable[Row]) -> int:
    """Decimal places for the results: 2 for percentages, 4 for fractions."""
    values = [abs(row['final']) for row in runs if row['final'] is not None]
    return 2 if max(values, default=0) > 1.5 else 4


def _number(value: Optional[float], digits: int, sign: str = '') -> str:
    return NONE if value is None else f'{value:{sign}.{digits}f}'


def _interval(low: Optional[float], high: Optional[float], digits: int) -> str:
    return NONE if low is None else f'{low:.{digits}f} to {high:.{digits}f}'


def _list(values: Sequence[Any]) -> str:
    same = len(set(values)) == 1
    return str(values[0]) if same else ', '.join(map(str, values))


def escape(text: str) -> str:
    """Escape a text so that Markdown shows it literally."""
    return re.sub(r'([\\`*_{}\[\]$~#!])', r'\\\1', html.escape(one_line(text), False))


def _cell(text: str) -> str:
    return ' '.join(text.replace('|', '&#124;').split())


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table; an empty string without rows."""
    lines = [head, ['---'] * len(head), *rows] if rows else []
    return '\n'.join(f'| {" | ".join(map(_cell, line))} |' for line in lines)
