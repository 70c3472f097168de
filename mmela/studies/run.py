"""One run of a study: what is asked for and what there is of it."""

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
    """What a run was made on.

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
        started (float): When, in seconds since 1970.
        machine (Machine): Where.
        threads (int): Threads that it was given.
        seconds (float | None): How long it took; None while it goes on, or
            if it was killed together with the driver.
        exit (int | None): Its exit code, negative for a signal.
        timed_out (bool): Whether it was ended by the time limit.
    """

    started: Seconds
    machine: Machine
    threads: int
    seconds: Optional[Seconds] = None
    exit: Optional[int] = None
    timed_out: bool = False


class Record(msgspec.Struct):
    """What the driver noted in the work directory of a run.

    Attributes:
        settings (dict | None): The config that it began with; None if the
            checkpoints there are of something else.
        start (Start | None): What it started from.
        done (bool): Whether it has finished.
        attempts (list[Attempt]): The processes, oldest first.
    """

    settings: Optional[Dict[str, Any]] = None
    start: Optional[Start] = None
    done: bool = False
    attempts: List[Attempt] = []


def read_record(work_dir: Union[str, Path]) -> Record:
    """Read what the driver noted in a work directory.

    Args:
        work_dir (str | Path): The directory.

    Returns:
        Record: The record; an empty one where there is none.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged.
    """
    path = Path(work_dir, RECORD)
    if not path.exists():
        return Record()
    try:
        return msgspec.convert(json.loads(path.read_text('utf-8')), Record)
    except (RecursionError, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(
            f'{path} is no record of a run: {one_line(error)}. Move its folder away'
        ) from error


@dataclass(frozen=True)
class Job:
    """A run of a study, of plain values only, as it may go to another machine.

    Attributes:
        variant (str): Name of the variant.
        seed (int): The seed.
        work_dir (str): Its work directory.
        cwd (str): Where it is run, which paths of data are seen from.
        tool (str): The training tool.
        config (str): The config.
        options (tuple[str]): Changes to it.
        after (str | None): Work directory of the run that it starts from.
        start (Start | None): How to start from it.
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
        """str: How messages call it."""
        return f'{self.variant} seed {self.seed}'

    @property
    def folder(self) -> Path:
        """Path: Its work directory."""
        return Path(self.work_dir)

    @property
    def record(self) -> Record:
        """Record: What the driver noted, see :func:`read_record`."""
        return read_record(self.work_dir)

    def write(self, record: Record) -> None:
        """Write the record, at once or not at all."""
        text = json.dumps(msgspec.to_builtins(record), indent=1)
        write_text(self.folder / RECORD, text)

    @property
    def done(self) -> bool:
        """bool: Whether it has finished."""
        return self.record.done

    def changes(self) -> List[str]:
        """Compare what there is with what the study asks for.

        Returns:
            list[str]: A line for each setting that differs.
        """
        record = self.record
        if not record.done and not any(self.folder.glob('*.pth')):
            return []  # nothing that would be mixed or lost
        if record.settings is None:
            return ['it was not made by a study, so its settings are unknown']
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
        """Run | None: Its logs; None where there are none yet."""
        try:
            return Run(self.folder)
        except FileNotFoundError:
            return None

    def final_metrics(self) -> Dict[str, float]:
        """dict[str, float]: The validation at its end; empty without one."""
        results = self.results()
        return {} if results is None else results.metrics.get(self.length, {})

    def checkpoint(self) -> Optional[Path]:
        """Find where to go on.

        What was killed while it wrote a checkpoint has left half a file, and
        mmengine may have removed the one before it already. What was killed in
        its last validation has to go on from an earlier checkpoint, as mmengine
        validates after an epoch only.

        Returns:
            Path | None: The last whole checkpoint to go on from, if any.
        """
        steps = {}
        for path in self.folder.glob(f'{self.unit}_*.pth'):
            number = path.stem[len(self.unit) + 1 :]
            if number.isdigit() and int(number) < self.length:
                steps[int(number)] = path
        whole = (steps[n] for n in sorted(steps, reverse=True))
        return next((path for path in whole if zipfile.is_zipfile(path)), None)

    def is_complete(self) -> bool:
        """Whether it was trained to its end, noted or not."""
        last = self.folder / f'{self.unit}_{self.length}.pth'
        return self.done or (zipfile.is_zipfile(last) and bool(self.final_metrics()))

    def progress(self) -> Tuple[float, str]:
        """How far it is: the share that is done, and as a text."""
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
        """The end of its log, and where the rest is."""
        path = self.folder / LOG
        text = path.read_text('utf-8', 'replace') if path.is_file() else ''
        return '\n'.join([f'the end of {path}:', *text.splitlines()[-lines:]])


def _show(leaves: Dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else 'not there'


def make_jobs(
    study: Study, out: Path, seeds: Sequence[int], tool: Optional[str] = None
) -> List[Job]:
    """The runs of a study: all variants of a seed before the next seed.

    Args:
        study (Study): The study.
        out (Path): Folder of all studies.
        seeds (Sequence[int]): The seeds.
        tool (str, optional): The training tool. Defaults to mmela's.

    Returns:
        list[Job]: The runs, each after the one that it starts from.
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
    """The runs of some variants, with those that they start from.

    Args:
        jobs (Sequence[Job]): All runs.
        only (Sequence[str], optional): The variants. Defaults to all.

    Returns:
        list[Job]: The runs, in order.
    """
    wanted = {job.work_dir for job in jobs if not only or job.variant in only}
    for job in reversed(jobs):
        if job.work_dir in wanted and job.after:
            wanted.add(job.after)
    return [job for job in jobs if job.work_dir in wanted]
