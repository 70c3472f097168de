"""A run of a study: its settings and its state on disk."""

import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import msgspec
from typing_extensions import Annotated

from mmela_light.command import find

from ..analysis.work_dir import Run
from ..command_line import one_line
from ..files import write_text
from .study import Start, Study, flatten

RECORD = 'study_run.json'
LOG = 'study.log'
_STEP = re.compile(r'(?:Epoch|Iter)\(train\)\s+(?:\[ *(\d+)\])?\[ *(\d+)/(\d+)\]')
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]


class Machine(msgspec.Struct):
    """The machine and software of a run.

    Attributes:
        cpu (str): The processor.
        cores (int | None): Number of its cores.
        gpu (str | None): The first GPU.
        torch (str): Version of torch.
        mmela (str): Version of mmela.
        revision (str | None): Commit of the checkout.
    """

    cpu: str
    cores: Optional[int]
    gpu: Optional[str]
    torch: str
    mmela: str
    revision: Optional[str]


class Attempt(msgspec.Struct):
    """A process that trained a run.

    Attributes:
        started (float): Start time in seconds since 1970.
        machine (Machine): The machine.
        threads (int): Number of threads.
        seconds (float | None): Duration; None while it runs, or if it was killed
            together with the driver.
        exit (int | None): Exit code, negative for a signal.
        timed_out (bool): Whether the time limit ended it.
    """

    started: Seconds
    machine: Machine
    threads: int
    seconds: Optional[Seconds] = None
    exit: Optional[int] = None
    timed_out: bool = False


class Record(msgspec.Struct):
    """The driver's record in the work directory of a run.

    Attributes:
        settings (dict | None): The initial config; None if the checkpoints there do
            not come from a study.
        start (Start | None): The run that it started from.
        done (bool): Whether it has finished.
        attempts (list[Attempt]): The processes, oldest first.
    """

    settings: Optional[Dict[str, Any]] = None
    start: Optional[Start] = None
    done: bool = False
    attempts: List[Attempt] = []


def read_record(work_dir: Union[str, Path]) -> Record:
    """Read the driver's record in a work directory.

    Args:
        work_dir (str | Path): The directory.

    Returns:
        Record: The record; an empty one if the file does not exist.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged.
    """
    path = Path(work_dir, RECORD)
    if not path.exists():
        return Record()
    try:
        return msgspec.convert(json.loads(path.read_text('utf-8')), Record)
    except (RecursionError, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(
            f'{path} is not a record of a run: {one_line(error)}. Move its folder away'
        ) from error


@dataclass(frozen=True)
class Job:
    """A run of a study. It holds only plain values, so it can go to another machine.

    Attributes:
        variant (str): Name of the variant.
        seed (int): The seed.
        work_dir (str): Its work directory.
        cwd (str): Working directory, which relative data paths refer to.
        tool (str): The training tool.
        config (str): The config.
        options (tuple[str]): Changes to the config.
        after (str | None): Work directory of the run that it starts from.
        start (Start | None): How to start from that run.
        settings (dict): The config with its changes.
        unit (str): ``'epoch'`` or ``'iter'``.
        length (int): Epochs or iterations.
    """

    variant: str
    seed: int
    work_dir: str
    cwd: str
    tool: str
    config: str
    options: Tuple[str, ...]
    after: Optional[str]
    start: Optional[Start]
    settings: dict
    unit: str
    length: int

    @property
    def name(self) -> str:
        """str: Name of the run in messages."""
        return f'{self.variant} seed {self.seed}'

    @property
    def folder(self) -> Path:
        """Path: Its work directory."""
        return Path(self.work_dir)

    @property
    def record(self) -> Record:
        """Record: The driver's record, see :func:`read_record`."""
        return read_record(self.work_dir)

    def write(self, record: Record) -> None:
        """Write the record completely or not at all."""
        text = json.dumps(msgspec.to_builtins(record), indent=1)
        write_text(self.folder / RECORD, text)

    @property
    def done(self) -> bool:
        """bool: Whether it has finished."""
        return self.record.done

    def changes(self) -> List[str]:
        """Compare the existing run with the settings of the study.

        Returns:
            list[str]: A line for each setting that differs.
        """
        record = self.record
        if not record.done and not any(self.folder.glob('*.pth')):
            return []  # there is nothing to mix or lose
        if record.settings is None:
            return ['its settings are unknown, because no study made it']
        old, new = (
            flatten({**each.settings, 'start': msgspec.to_builtins(each.start)})
            for each in (record, self)
        )
        return [
            f'{key}: {_show(old, key)} -> {_show(new, key)}'
            for key in {**old, **new}
            if _show(old, key) != _show(new, key)
        ]

    def results(self) -> Optional[Run]:
        """Run | None: Its logs; None if there are none yet."""
        try:
            return Run(self.folder)
        except FileNotFoundError:
            return None

    def final_metrics(self) -> Dict[str, float]:
        """dict[str, float]: Metrics of the final validation; empty without one."""
        results = self.results()
        return {} if results is None else results.metrics.get(self.length, {})

    def checkpoint(self) -> Optional[Path]:
        """Find the checkpoint to continue from.

        A run that was killed while writing a checkpoint leaves an incomplete file, and
        mmengine may already have deleted the previous one. A run that was killed in its
        last validation has to continue from an earlier checkpoint, since mmengine only
        validates after an epoch.

        Returns:
            Path | None: The last complete checkpoint before the end, if any.
        """
        steps = {}
        for path in self.folder.glob(f'{self.unit}_*.pth'):
            number = path.stem[len(self.unit) + 1 :]
            if number.isdigit() and int(number) < self.length:
                steps[int(number)] = path
        whole = (steps[n] for n in sorted(steps, reverse=True))
        return next((path for path in whole if zipfile.is_zipfile(path)), None)

    def is_complete(self) -> bool:
        """Whether it was trained to its end, even if the record does not say so."""
        last = self.folder / f'{self.unit}_{self.length}.pth'
        return self.done or (zipfile.is_zipfile(last) and bool(self.final_metrics()))

    def progress(self) -> Tuple[float, str]:
        """Progress of the training, as a fraction and as text."""
        try:
            with open(self.folder / LOG, 'rb') as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 20000))
                steps = _STEP.findall(log.read().decode('utf-8', 'replace'))
        except FileNotFoundError:
            steps = []
        if not steps:
            return 0.0, 'starting'
        epoch, step, steps_each = steps[-1]
        share = int(step) / max(1, int(steps_each))
        if not epoch:
            return share, f'iteration {step}/{steps_each}'
        text = f'epoch {epoch}/{self.length}, {step}/{steps_each}'
        return (int(epoch) - 1 + share) / self.length, text

    def log_end(self, lines: int = 15) -> str:
        """The last lines of its log, with the path of the log."""
        path = self.folder / LOG
        text = path.read_text('utf-8', 'replace') if path.is_file() else ''
        return '\n'.join([f'the end of {path}:', *text.splitlines()[-lines:]])


def _show(leaves: Dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else 'missing'


def make_jobs(
    study: Study, out: Path, seeds: Sequence[int], tool: Optional[str] = None
) -> List[Job]:
    """List the runs of a study: all variants of one seed, then the next seed.

    Args:
        study (Study): The study.
        out (Path): Folder of all studies.
        seeds (Sequence[int]): The seeds.
        tool (str, optional): The training tool. Defaults to ``tools/train.py`` of
            mmela.

    Returns:
        list[Job]: The runs, each after the run that it starts from.
    """
    root = out.resolve() / study.name
    ordered: List[str] = []

    def add(name: str) -> None:
        start = study.variants[name].start
        if start is not None:
            add(start.variant)
        if name not in ordered:
            ordered.append(name)

    for name in study.variants:
        add(name)
    jobs = []
    for seed in seeds:
        for name in ordered:
            variant = study.variants[name]
            start = variant.start
            seeded = {**(variant.settings.get('randomness') or {}), 'seed': seed}
            jobs.append(
                Job(
                    name,
                    seed,
                    str(root / name / f'seed_{seed}'),
                    os.getcwd(),
                    tool or str(find('tools/train.py')),
                    str(variant.config),
                    (*variant.options, f'randomness.seed={seed}'),
                    str(root / start.variant / f'seed_{seed}') if start else None,
                    start,
                    {**variant.settings, 'randomness': seeded},
                    variant.unit,
                    variant.length,
                )
            )
    return jobs


def select(jobs: Sequence[Job], only: Optional[Sequence[str]] = None) -> List[Job]:
    """Select the runs of some variants, and the runs that they start from.

    Args:
        jobs (Sequence[Job]): All runs.
        only (Sequence[str], optional): Names of the variants. Defaults to all.

    Returns:
        list[Job]: The runs, in order.
    """
    wanted = {job.work_dir for job in jobs if not only or job.variant in only}
    for job in reversed(jobs):
        if job.work_dir in wanted and job.after:
            wanted.add(job.after)
    return [job for job in jobs if job.work_dir in wanted]
