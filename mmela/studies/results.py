"""Collect the results of a study: tidy tables and statistics."""

import csv
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import msgspec
import numpy as np
from scipy import stats
from scipy.spatial.distance import pdist

from ..analysis.work_dir import Run
from ..files import replacing
from ..visualization.drawing import short_name
from .run import Attempt, Job
from .study import Study

# Columns of the table of runs before and after the metrics of the study
COLUMNS = ('study', 'variant', 'label', 'seed', 'status', 'final', 'best', 'best_at')
MORE = (
    'attentions',
    'active',
    'pruned',
    'step_time',
    'step_times',
    'memory',
    'wall_time',
    'attempts',
    'threads',
    'cpu',
    'cores',
    'gpu',
    'torch',
    'mmela',
    'revision',
)
LAYER_COLUMNS = (
    'variant',
    'seed',
    'window',
    'layer',
    'stage',
    'divergence',
    'shape',
    'own',
    'baseline',
    'value',
    'pruned',
    'learned',
)
Row = Dict[str, Any]


def collect(study: Study, jobs: Iterable[Job]) -> Tuple[List[Row], List[Row]]:
    """Read the results of runs from their work directories.

    Args:
        study (Study): The study.
        jobs (Iterable[Job]): The runs.

    Returns:
        tuple[list[dict], list[dict]]: A row for each run, and a row for each layer of
        each pruning decision. Unknown values are None; only finished runs have final
        numbers.
    """
    runs, layers = [], []
    for job in jobs:
        row: Row = dict.fromkeys((*COLUMNS, *MORE))
        label = study.variants[job.variant].label
        row.update(study=study.name, variant=job.variant, label=label, seed=job.seed)
        row['status'] = 'done' if job.done else 'missing'
        results = job.results()
        if results is not None:
            if not job.done:
                row['status'] = f'at {job.unit} {results.done} of {job.length}'
            _add_results(row, study.metric, job, results)
            layers += _layers(job, results)
        _add_attempts(row, job.record.attempts)
        runs.append(row)
    return runs, layers


def _add_results(row: Row, metric: str, job: Job, results: Run) -> None:
    times = [v['time'] for v in results.training.values() if 'time' in v]
    periods = [p.times.median for p in results.step_times() if p.times is not None]
    memory = [v['memory'] for v in results.training.values() if 'memory' in v]
    pruned = [
        f'{_window(decision)}: ' + (' '.join(map(short_name, decision.pruned)) or '-')
        for decision in results.decisions
    ]
    row.update(
        pruned='; '.join(pruned) or None,
        step_time=median(times) if times else None,
        step_times=' '.join(f'{seconds:.4g}' for seconds in periods) or None,
        memory=max(memory, default=None),
    )
    if not job.done:
        return
    final = job.final_metrics()
    row['final'] = final.get(metric)
    if not final:
        row['status'] = 'no final validation'
    for name, value in final.items():
        row[_metric_column(name)] = value
    row['best_at'], row['best'] = results.best(metric) or (None, None)
    parameters = results.parameters()
    if parameters is not None:
        row.update(attentions=parameters.attentions, active=parameters.active)


def _metric_column(name: str) -> str:
    """Column of a metric; prefixed if its name is already in use."""
    return f'metric {name}' if name in (*COLUMNS, *MORE) else name


def _add_attempts(row: Row, attempts: Sequence[Attempt]) -> None:
    seconds = [a.seconds for a in attempts if a.seconds is not None]
    row.update(attempts=len(attempts), wall_time=round(sum(seconds), 1) or None)
    if attempts:
        last = attempts[-1]
        row.update(msgspec.structs.asdict(last.machine), threads=last.threads)


def _window(decision: Any) -> str:
    first, last = decision.window
    return f'{decision.unit} {first}' + (f'-{last}' if last > first else '')


def _layers(job: Job, results: Run) -> List[Row]:
    return [
        dict(
            variant=job.variant,
            seed=job.seed,
            window=_window(decision),
            layer=short_name(layer.name),
            stage=short_name(layer.stage),
            divergence=layer.divergence,
            shape=layer.shape,
            own=layer.own,
            baseline=layer.baseline,
            value=layer.value,
            pruned=layer.pruned,
            learned=decision.learned,
        )
        for decision in results.decisions
        for layer in decision.layers
    ]


def write_tables(runs: List[Row], layers: List[Row], path: Path) -> List[Path]:
    """Write ``NAME.csv``, and ``NAME_layers.csv`` if there are decisions.

    Args:
        runs (list[dict]): A row for each run.
        layers (list[dict]): A row for each layer and decision.
        path (Path): ``NAME.csv``.

    Returns:
        list[Path]: The written files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = (*COLUMNS, *MORE)
    metrics = dict.fromkeys(k for row in runs for k in row if k not in known)
    tables = [(path, (*COLUMNS, *metrics, *MORE), runs)]
    if layers:
        second = path.with_name(f'{path.stem}_layers.csv')
        tables.append((second, LAYER_COLUMNS, layers))
    for target, columns, rows in tables:
        with replacing(target) as temporary, open(
            temporary, 'w', newline='', encoding='utf-8'
        ) as file:
            writer = csv.DictWriter(file, columns, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
    return [target for target, _, _ in tables]


# -- statistics ------------------------------------------------------------


class Spread(NamedTuple):
    """Statistics of a sample.

    Attributes:
        n (int): Number of values.
        mean (float | None): Mean; None without values.
        deviation (float | None): Standard deviation; None for fewer than two values.
        low (float | None): Lower end of the 95 % confidence interval of the mean, by
            Student's t; None for fewer than two values.
        high (float | None): Upper end of the interval.
        p (float | None): p value of the t test for a mean of 0; None for fewer than
            two values, or if all are 0.
    """

    n: int
    mean: Optional[float] = None
    deviation: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None
    p: Optional[float] = None


def spread(values: Sequence[float]) -> Spread:
    """Compute the statistics of a sample.

    Args:
        values (Sequence[float]): The values.

    Returns:
        Spread: The statistics.
    """
    if len(values) < 2:
        return Spread(len(values), *map(float, values))
    mean = float(np.mean(values))
    if np.ptp(values) == 0:  # the test divides by the deviation
        return Spread(len(values), mean, 0.0, mean, mean, None if mean == 0 else 0.0)
    test = stats.ttest_1samp(values, 0)
    low, high = map(float, test.confidence_interval(0.95))
    deviation = float(stats.tstd(values))
    return Spread(len(values), mean, deviation, low, high, float(test.pvalue))


def finals(runs: Iterable[Row], variant: str, key: str = 'final') -> Dict[int, float]:
    """Collect a number of a variant by seed.

    Args:
        runs (Iterable[dict]): A row for each run.
        variant (str): A variant.
        key (str): Column of the number. Defaults to ``'final'``.

    Returns:
        dict[int, float]: The number by seed, for the seeds that have it.
    """
    return {
        row['seed']: row[key]
        for row in runs
        if row['variant'] == variant and row.get(key) is not None
    }


def difference(runs: Sequence[Row], variant: str, against: str) -> Spread:
    """Differences of the final metric, paired by seed.

    Args:
        runs (Sequence[dict]): A row for each run.
        variant (str): A variant.
        against (str): The variant to compare with.

    Returns:
        Spread: Statistics of the differences over the seeds that both have; ``p``
        belongs to the paired t test.
    """
    a, b = finals(runs, variant), finals(runs, against)
    return spread([a[seed] - b[seed] for seed in a if seed in b])


def expected_jaccard(first: int, second: int, both: int, m: int, k: int) -> float:
    """Expected Jaccard index of two random choices.

    Args:
        first (int): Number of attentions that the first may choose from.
        second (int): Number of attentions that the second may choose from.
        both (int): Number of attentions that both may choose.
        m (int): Number that the first chooses.
        k (int): Number that the second chooses.

    Returns:
        float: The exact expectation; 1 for two empty choices.
    """
    if not m + k:
        return 1.0
    mean = 0.0
    # j: chosen by the first among the common ones; i: of these, chosen by the second
    for j in range(min(both, m) + 1):
        for i in range(min(j, k) + 1):
            chance = stats.hypergeom.pmf(j, first, both, m)
            chance *= stats.hypergeom.pmf(i, second, j, k)
            mean += chance * i / (m + k - i)
    return float(mean)


class Agreement(NamedTuple):
    """Agreement of the seeds of a variant on which attentions are pruned.

    Attributes:
        window (str): Window of the decision; one for each seed if they differ.
        learned (list[bool | None]): For each seed, whether attention had learned.
        pruned (list[int]): Number of pruned attentions of each seed.
        candidates (list[int]): Number of attentions with a divergence, for each seed.
        jaccard (float | None): Mean Jaccard index over pairs of seeds; None for fewer
            than two seeds.
        chance (float | None): Expected index of random choices of the same numbers.
        correlation (list[float]): Pearson's correlation of the divergences with the
            baseline, for each seed where it is defined.
    """

    window: str
    learned: List[Optional[bool]]
    pruned: List[int]
    candidates: List[int]
    jaccard: Optional[float]
    chance: Optional[float]
    correlation: List[float]


def agreements(layers: Iterable[Row], variant: str) -> List[Agreement]:
    """Compare the decisions of the seeds of a variant.

    Args:
        layers (Iterable[dict]): A row for each layer and decision.
        variant (str): The variant.

    Returns:
        list[Agreement]: One entry for each decision.
    """
    seeds: Dict[int, Dict[str, List[Row]]] = {}
    for row in layers:
        if row['variant'] == variant and row['divergence'] is not None:
            windows = seeds.setdefault(row['seed'], {})
            windows.setdefault(row['window'], []).append(row)
    result = []
    # Compare the first decisions of all seeds, then the second ones, and so on
    for number in range(max(map(len, seeds.values()), default=0)):
        each = [list(s.items())[number] for s in seeds.values() if len(s) > number]
        decisions = [rows for _, rows in each]
        open_ = [{r['layer'] for r in rows} for rows in decisions]
        masks = [{r['layer'] for r in rows if r['pruned']} for rows in decisions]
        jaccard = chance = None
        if len(masks) > 1:
            names = sorted(set.union(*open_))
            table = np.array([[name in mask for name in names] for mask in masks])
            jaccard = float(np.mean(1 - pdist(table, 'jaccard')))
            pairs = combinations(zip(open_, masks), 2)
            chance = float(
                np.mean(
                    [
                        expected_jaccard(len(o), len(q), len(o & q), len(m), len(k))
                        for (o, m), (q, k) in pairs
                    ]
                )
            )
        result.append(
            Agreement(
                ', '.join(dict.fromkeys(window for window, _ in each)),
                [rows[0]['learned'] for rows in decisions],
                list(map(len, masks)),
                list(map(len, open_)),
                jaccard,
                chance,
                [c for c in map(_correlation, decisions) if c is not None],
            )
        )
    return result


def _correlation(rows: List[Row]) -> Optional[float]:
    """Correlation of divergences with the baseline; None if undefined."""
    pairs = [(r['divergence'], r['baseline']) for r in rows if r['baseline']]
    if len(pairs) < 3 or any(np.ptp(column) == 0 for column in zip(*pairs)):
        return None
    return float(stats.pearsonr(*zip(*pairs))[0])
