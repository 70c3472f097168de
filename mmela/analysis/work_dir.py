"""Read a run from its work directory."""

import ast
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from mmengine.hooks import CheckpointHook

from ..command_line import one_line
from ..convert.networks import read_state_dict
from ..engine.step_times import StepTimeSummary
from ..layers import AttentionState
from ..layers.state import decode
from ..pruning import PruningDecision, PruningReport

# Entries of a state dict that are not trained
_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')
# Numbers that the report computes with; the counts among them are integers
_NUMBERS = ('loss', 'time', 'data_time', 'epoch', 'iter')
_COUNTS = ('epoch', 'iter')
_NO_METRICS = ('time', 'data_time', 'step', 'epoch', 'iter', 'memory')


@dataclass
class StepTime:
    """Training speed between two prunings.

    Attributes:
        first (int): First iteration.
        last (int): Last iteration.
        active (int | None): Number of active attentions; None if the run has no hook.
        times (StepTimeSummary | None): Logged step times; None if there are none.
        data_seconds (float | None): Median of the time spent waiting for data, which
            is part of the step times.
    """

    first: int
    last: int
    active: Optional[int]
    times: Optional[StepTimeSummary]
    data_seconds: Optional[float]


@dataclass
class Parameters:
    """Numbers of parameters in a checkpoint.

    Attributes:
        total (int): All parameters: the elements of the state dict without the
            statistics of normalisation layers.
        attention (int): Parameters of layer attentions.
        pruned (int): Parameters of attentions in the state ``PRUNED``.
        attentions (int): Number of layer attentions.
        active (int): Number of active ones.
        value_only (int): Number of attentions in the state ``VALUE_ONLY``, whose
            parameters do not count as ``pruned``.
    """

    total: int
    attention: int
    pruned: int
    attentions: int
    active: int
    value_only: int


class Run:
    """A run, read from its work directory.

    Each start of a run has its own folder. A resumed run combines all of them: a later
    start replaces the records from the point where it resumed. An earlier run in the
    same directory that was not resumed is ignored.

    Args:
        work_dir (str | Path): Work directory of an mmengine runner.

    Attributes:
        starts (list[str]): Names of the folders of the run, oldest first.
        unit (str): Unit of the validation metrics, ``'epoch'`` or ``'iteration'``.
        training (dict[int, dict]): Logged training scalars by iteration.
        metrics (dict[int, dict[str, float]]): Validation metrics by epoch, or
            by iteration in an iteration-based run.
        hook (dict | None): Arguments of the pruning hook, from
            ``pruning.json``; None without one.
        decisions (tuple[PruningDecision]): Decisions of the pruning hook.
        config_path (Path | None): The config dumped by the last start:
            ``vis_data/config.py`` in its folder, or else the newest config in the
            directory, which another tool may have written.
        config_name (str): Name of the config; empty without one.
        config (str): The text of the config.
        notes (list[str]): Remarks on the files for the reader.

    Raises:
        FileNotFoundError: If the directory does not exist or has no log of scalars.
        NotADirectoryError: If it is a file.
        ValueError: If a log or ``pruning.json`` is invalid.
    """

    def __init__(self, work_dir: Union[str, Path]) -> None:
        self.work_dir = Path(work_dir)
        if not self.work_dir.exists():
            raise FileNotFoundError(f'{self.work_dir} does not exist')
        if not self.work_dir.is_dir():
            raise NotADirectoryError(f'{self.work_dir} is not a directory')
        logs = sorted(self.work_dir.glob('*/vis_data/scalars.json'))
        if not logs:
            raise FileNotFoundError(
                f'{self.work_dir} is not the work directory of a run: it has no '
                '*/vis_data/scalars.json'
            )
        self.starts: List[str] = []
        self.unit = 'epoch'
        self.training: Dict[int, dict] = {}
        self.metrics: Dict[int, Dict[str, float]] = {}
        self.notes: List[str] = []
        for start in _in_order([_read_log(log) for log in logs]):
            self._merge(start)
        if not self.training and not self.metrics:
            raise FileNotFoundError(
                f'{logs[-1]} has neither a training loss nor a metric'
            )
        self._read_config()
        self._read_decisions()

    # -- logs --------------------------------------------------------------

    def _merge(self, start: 'StartLog') -> None:
        """Add one start of the run."""
        if not start.training:
            # Validation without training logs step 0; a run that was stopped at once
            # logs nothing.
            if not self.training:
                self.metrics.update(start.metrics)
            return
        first = min(start.training)
        self.unit = start.unit
        self.training = {k: v for k, v in self.training.items() if k < first}
        self.metrics = {k: v for k, v in self.metrics.items() if k < start.begin}
        if not self.training:
            self.starts, self.metrics = [], {}
        self.starts.append(start.name)
        self.training.update(sorted(start.training.items()))
        self.metrics.update(sorted(start.metrics.items()))

    @property
    def losses(self) -> Dict[int, float]:
        """dict[int, float]: Training loss by iteration."""
        return {k: v['loss'] for k, v in self.training.items() if 'loss' in v}

    @property
    def metric_names(self) -> List[str]:
        """list[str]: Names of all validation metrics."""
        return list(dict.fromkeys(k for m in self.metrics.values() for k in m))

    @property
    def done(self) -> Optional[int]:
        """int | None: Epoch or iteration of the last training log."""
        if not self.training:
            return None
        last = max(self.training)
        return self.training[last].get('epoch', last)

    @property
    def planned(self) -> Optional[int]:
        """int | None: Epochs or iterations in the config."""
        key = 'max_epochs' if self.unit == 'epoch' else 'max_iters'
        try:
            statements = ast.parse(self.config).body
        except (MemoryError, RecursionError, SyntaxError, ValueError):
            return None
        for statement in statements:
            if (
                isinstance(statement, ast.Assign)
                and isinstance(statement.value, ast.Call)
                and getattr(statement.targets[0], 'id', '') == 'train_cfg'
            ):
                for keyword in statement.value.keywords:
                    value = getattr(keyword.value, 'value', None)
                    if keyword.arg == key and isinstance(value, int):
                        return value
        return None

    @property
    def started(self) -> str:
        """str: Time of the first start."""
        if not self.starts:
            return 'unknown'
        try:
            stamp = time.strptime(self.starts[0], '%Y%m%d_%H%M%S')
        except ValueError:
            return self.starts[0]
        return time.strftime('%Y-%m-%d %H:%M:%S', stamp)

    def best(self, name: str) -> Optional[Tuple[int, float]]:
        """Find the best value of a metric by mmengine's rule.

        Args:
            name (str): Name of the metric.

        Returns:
            tuple[int, float] | None: Epoch or iteration and value; the first one in a
            tie. None if mmengine has no rule for the metric, or if it has no value; in
            COCO metrics, -1 means no value.
        """
        points = [
            (step, values[name])
            for step, values in self.metrics.items()
            if values.get(name) is not None and values[name] == values[name]
        ]
        if name.startswith('coco/'):
            points = [(step, value) for step, value in points if value != -1]
        lower = name.lower()
        keys = CheckpointHook._default_greater_keys
        if any(key.lower() in lower for key in CheckpointHook._default_less_keys):
            return min(points, key=lambda p: p[1], default=None)
        if any(key.lower() in lower for key in keys):
            return max(points, key=lambda p: p[1], default=None)
        return None

    # -- other files -------------------------------------------------------

    def _read_config(self) -> None:
        configs = sorted(self.work_dir.glob('*.py'), key=lambda p: p.stat().st_mtime)
        texts = {path: path.read_text('utf-8', 'replace') for path in configs}
        self.config_path = configs[-1] if configs else None
        for start in self.starts:
            dump = self.work_dir / start / 'vis_data' / 'config.py'
            if dump.is_file():
                self.config_path = dump
                texts[dump] = dump.read_text('utf-8', 'replace')
        self.config, self.config_name = '', ''
        if self.config_path is None:
            self.notes.append('The directory has no dumped config.')
            return
        self.config = texts[self.config_path]
        # The runner dumps the config under its original name, too
        same = [path.name for path in configs if texts[path] == self.config]
        self.config_name = same[-1] if same else self.config_path.name

    def _read_decisions(self) -> None:
        path = self.work_dir / 'pruning.json'
        self.hook: Optional[dict] = None
        self.decisions: Tuple[PruningDecision, ...] = ()
        if not path.exists():
            return
        report = PruningReport.read(path)
        self.hook, self.decisions = report.hook, report.decisions
        if self.config and 'LayerAttentionPruningHook' not in self.config:
            self.notes.append(
                'The config has no LayerAttentionPruningHook, so pruning.json may come '
                'from an earlier run in this directory.'
            )

    @property
    def checkpoint(self) -> Optional[Path]:
        """Path | None: The last checkpoint, if it still exists."""
        pointer = self.work_dir / 'last_checkpoint'
        if not pointer.exists():
            return None
        path = Path(pointer.read_text(encoding='utf-8', errors='replace').strip())
        # The directory may have been moved
        existing = [p for p in (self.work_dir / path.name, path) if p.exists()]
        return existing[0] if existing and path.name else None

    @property
    def best_checkpoint(self) -> Optional[Path]:
        """Path | None: The best checkpoint, the newest if there are more."""
        return max(
            self.work_dir.glob('best_*.pth'),
            key=lambda p: p.stat().st_mtime,
            default=None,
        )

    def numbered_checkpoints(self) -> Dict[int, Path]:
        """Checkpoints by what the pruning hook counts.

        Returns:
            dict[int, Path]: ``epoch_N.pth`` by epoch, or ``iter_N.pth`` by iteration
            if the windows of the hook count iterations.
        """
        by_epoch = not self.decisions or self.decisions[0].unit == 'epoch'
        start = 'epoch_' if by_epoch else 'iter_'
        return {
            int(path.stem[len(start) :]): path
            for path in self.work_dir.glob(f'{start}*.pth')
            if path.stem[len(start) :].isdigit()
        }

    # -- effect of pruning --------------------------------------------------

    @property
    def total_attentions(self) -> Optional[int]:
        """int | None: Active attentions before the first pruning."""
        return len(self.decisions[0].layers) if self.decisions else None

    def step_times(self) -> List[StepTime]:
        """Compute the training speed between prunings.

        Returns:
            list[StepTime]: One entry for each period: from the start to the first
            pruning, from there to the next one, and so on to the end.
        """
        bounds = [0] + [decision.iteration for decision in self.decisions]
        bounds.append(max([*self.training, *bounds]))
        active = [self.total_attentions]
        active += [len(decision.active) for decision in self.decisions]
        times = []
        for start, end, number in zip(bounds, bounds[1:], active):
            records = [
                v for k, v in self.training.items() if start < k <= end and 'time' in v
            ]
            waits = [v['data_time'] for v in records if 'data_time' in v]
            times.append(
                StepTime(
                    first=start + 1,
                    last=end,
                    active=number,
                    times=StepTimeSummary.of([v['time'] for v in records])
                    if records
                    else None,
                    data_seconds=median(waits) if waits else None,
                )
            )
        return times

    def parameters(self) -> Optional[Parameters]:
        """Count parameters in the last checkpoint, or else the best one.

        Returns:
            Parameters | None: The numbers; None if no checkpoint can be read, with
            the reason in :attr:`notes`.
        """
        path = self.checkpoint or self.best_checkpoint
        if path is None:
            self.notes.append('There is no checkpoint to count parameters in.')
            return None
        try:
            return _count_parameters(read_state_dict(path)[1])
        except (ImportError, OSError, TypeError, ValueError) as error:
            self.notes.append(
                f'Parameters are not counted: {path.name} cannot be read '
                f'({one_line(error)}).'
            )
            return None


def _count_parameters(state: dict) -> Parameters:
    suffix = '.layer_attn.state'
    states = {
        k[: -len('state')]: decode(v)[0] for k, v in state.items() if k.endswith(suffix)
    }
    total = attention = pruned = 0
    for key, value in state.items():
        if (
            not isinstance(value, torch.Tensor)
            or key.endswith((suffix, '.layer_attn.signature'))
            or key.rsplit('.', 1)[-1] in _STATISTICS
        ):
            continue
        total += value.numel()
        block, separator, _ = key.partition('.layer_attn.')
        if separator:
            attention += value.numel()
            if states.get(block + separator) == AttentionState.PRUNED:
                pruned += value.numel()
    values = list(states.values())
    return Parameters(
        total,
        attention,
        pruned,
        len(values),
        values.count(AttentionState.ACTIVE),
        values.count(AttentionState.VALUE_ONLY),
    )


def _plain_key(key: str) -> str:
    """Remove the prefix that mmengine's ``log_with_hierarchy`` adds."""
    for mode in ('train/', 'val/'):
        if key.startswith(mode):
            return key[len(mode) :]
    return key


def _read_lines(log: Path) -> List[dict]:
    try:
        lines = log.read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'{log} is not a text file: {error}') from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError('not an object')
        except (RecursionError, ValueError) as error:
            if number == len(lines):
                break  # the run was killed while writing
            raise ValueError(f'{log}, line {number}, is not a JSON object') from error
        for key, value in record.items():
            name = _plain_key(key)
            if name in _NUMBERS and not _is_number(value, name in _COUNTS):
                raise ValueError(
                    f'{log}, line {number}, has {key}={value!r:.99}, which is not a '
                    'number'
                )
        records.append(record)
    return records


@dataclass
class StartLog:
    """The log of one start of a run.

    Attributes:
        name (str): Name of its folder: its start in local time.
        training (dict[int, dict]): Scalars by iteration.
        metrics (dict[int, dict[str, float]]): Validation metrics by epoch, or
            by iteration in an iteration-based run.
    """

    name: str
    training: Dict[int, dict]
    metrics: Dict[int, Dict[str, float]]

    @property
    def unit(self) -> str:
        """str: ``'epoch'`` or ``'iteration'``."""
        return 'epoch' if 'epoch' in self.training[min(self.training)] else 'iteration'

    @property
    def begin(self) -> int:
        """int: Its first epoch or iteration; -1 without training."""
        first = min(self.training, default=-1)
        return self.training[first].get('epoch', first) if self.training else first


def _in_order(starts: List[StartLog]) -> List[StartLog]:
    """Sort the starts of a run.

    Folder names are in local time, and clocks may be set back, so names only separate
    independent runs in the same directory. Within a run, resumed starts come after the
    first one, and starts that got further come later.
    """
    first = min((start.begin for start in starts if start.training), default=0)
    runs: List[List[StartLog]] = [[]]
    for start in sorted(starts, key=lambda start: start.name):
        if start.begin == first and any(s.begin == first for s in runs[-1]):
            runs.append([])
        runs[-1].append(start)
    for run in runs:
        run.sort(key=lambda s: (s.begin > first, max(s.training, default=0)))
    return [start for run in runs for start in run]


def _read_log(log: Path) -> StartLog:
    """Read ``NAME/vis_data/scalars.json``."""
    training: Dict[int, dict] = {}
    metrics: Dict[int, Dict[str, float]] = {}
    for record in _read_lines(log):
        step = record.get('step')
        if not _is_number(step, count=True) or any(
            k.startswith('layer_attention/') for k in record
        ):
            continue
        trains = (
            'iter' in record
            or 'loss' in record
            or any(k.startswith('train/') for k in record)
        )
        record = {_plain_key(k): v for k, v in record.items()}
        if trains:
            training[step] = record
            continue
        values = {
            k: v
            for k, v in record.items()
            if k not in _NO_METRICS and _is_number(v) and ('/' in k or 'time' in record)
        }
        if values:
            metrics.setdefault(step, {}).update(values)
    return StartLog(log.parents[1].name, training, metrics)


def _is_number(value: Any, count: bool = False) -> bool:
    """Whether a value of a log is a number, and an integer is not too large."""
    if isinstance(value, float):
        return not count
    return type(value) is int and abs(value) < 2**53
