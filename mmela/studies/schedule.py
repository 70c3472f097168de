"""The runs of a study, one after the other and side by side."""

import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mmela_light.command import find

from .run import Attempt, Job, Taken, is_done

PAUSE = 0.5  # seconds between two looks at the processes
Failures = Dict[str, str]


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


def visible_gpus() -> List[str]:
    """Names of the GPUs for ``CUDA_VISIBLE_DEVICES``, an entry for each."""
    count = torch.cuda.device_count()
    given = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    names = [name.strip() for name in given.split(',') if name.strip()]
    return names[:count] if names else [str(i) for i in range(count)]


def visible_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare(commands: Sequence[str]) -> None:
    """Run the commands of a study that come before all runs.

    Args:
        commands (Sequence[str]): The commands; ``{root}`` is the checkout, and
            ``python`` this Python.

    Raises:
        ValueError: If one fails.
    """
    root = find('train.py').parents[1]
    for command in commands:
        words = shlex.split(command.replace('{root}', shlex.quote(str(root))))
        if words and words[0] in ('python', 'python3'):
            words[0] = sys.executable
        try:
            code = subprocess.run(words, stdin=subprocess.DEVNULL).returncode
        except OSError as error:
            raise ValueError(f'the preparation {command!r} fails: {error}') from error
        if code:
            raise ValueError(f'the preparation {command!r} ends with exit code {code}')


# -- the plan --------------------------------------------------------------


def estimates(jobs: Sequence[Job], all_jobs: Sequence[Job]) -> Dict[str, float]:
    """Estimate the seconds that runs still take.

    The pace is that of finished runs of the variant, or else the middle one of
    what other variants of the study took per epoch or iteration.

    Args:
        jobs (Sequence[Job]): Runs to estimate.
        all_jobs (Sequence[Job]): Runs to learn from.

    Returns:
        dict[str, float]: Seconds by work directory; nothing for runs about
        which nothing is known.
    """
    paces: Dict[Tuple[str, str], List[float]] = {}
    for job in all_jobs:
        record = job.record
        seconds = [a['seconds'] for a in record.get('attempts', [])]
        if record.get('done') and seconds and None not in seconds:
            pace = sum(seconds) / (job.length - first_step(job))
            paces.setdefault((job.variant, job.unit), []).append(pace)
    found = {}
    for job in jobs:
        own = paces.get((job.variant, job.unit))
        others = [p for (_, unit), ps in paces.items() if unit == job.unit for p in ps]
        if not own and not others:
            continue
        checkpoint = job.checkpoint()
        begun = int(checkpoint.stem.split('_')[1]) if checkpoint else first_step(job)
        found[job.work_dir] = statistics.median(own or others) * (job.length - begun)
    return found


def first_step(job: Job) -> int:
    """Epoch or iteration that a run starts after, by what it resumes from."""
    if job.start is None or job.start['how'] != 'resume':
        return 0
    number = Path(job.start['checkpoint']).stem.rpartition('_')[2]
    return min(int(number), job.length - 1) if number.isdigit() else 0


def simulate(jobs: Sequence[Job], seconds: Dict[str, float], slots: int) -> float:
    """Seconds that runs take side by side, in their order.

    Args:
        jobs (Sequence[Job]): The runs.
        seconds (dict[str, float]): What each takes, by work directory.
        slots (int): How many run at a time.

    Returns:
        float: Seconds until the last has ended.
    """
    free, ends = [0.0] * max(1, slots), {'': 0.0}
    for job in jobs:
        free.sort()
        begin = max(free[0], ends.get(job.after or '', 0.0))
        ends[job.work_dir] = free[0] = begin + seconds[job.work_dir]
    return max(free)


def duration(seconds: float) -> str:
    """Seconds for a reader: ``1 h 05 min``."""
    if seconds < 60:
        return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    return (
        f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60:02} min'
    )


def plan(jobs: Sequence[Job], all_jobs: Sequence[Job], slots: int) -> Iterator[str]:
    """Tell what would be run.

    Args:
        jobs (Sequence[Job]): The runs.
        all_jobs (Sequence[Job]): Runs to learn times from.
        slots (int): How many run side by side.

    Yields:
        str: A line.
    """
    left = [job for job in jobs if not job.done]
    seconds = estimates(left, all_jobs)
    for job in jobs:
        text = f'{job.name:32} '
        checkpoint = job.checkpoint()
        if job.done:
            text += 'done'
        else:
            text += f'{job.length} {job.unit}s'
            known = seconds.get(job.work_dir)
            text += ', time unknown' if known is None else f', about {duration(known)}'
            if checkpoint:
                text += f', goes on from {checkpoint.name}'
            elif job.start:
                start = job.start
                text += f', {start["how"]} {start["checkpoint"]} of {start["variant"]}'
        yield text.rstrip()
    yield f'{len(jobs) - len(left)} of {len(jobs)} runs done, {slots} side by side'
    if left and len(seconds) == len(left):
        yield f'about {duration(simulate(left, seconds, slots))} to go'
    elif left:
        yield 'time to go unknown: no finished run tells how long an epoch takes'


# -- running ---------------------------------------------------------------


class Display:
    """A bar for each run and one for all, or plain lines where no terminal is.

    Args:
        total (int): Number of runs.
        done (int): Those that are done.
    """

    def __init__(self, total: int, done: int) -> None:
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        columns = (
            TextColumn('{task.description}', markup=False),
            BarColumn(),
            TextColumn('{task.fields[text]}', markup=False),
            TimeElapsedColumn(),
        )
        terminal = self.console.is_terminal
        self.bars = Progress(*columns, console=self.console, disable=not terminal)
        self._all = self.bars.add_task('all runs', total=total, text='')
        self._bars: Dict[str, TaskID] = {}
        self._total, self._done = total, done

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(f'{time.strftime("%H:%M:%S")} {text}')

    def show(self, jobs: Sequence[Job]) -> None:
        """Bring the bars up to date."""
        if self.bars.disable:
            return
        for name in set(self._bars) - {job.name for job in jobs}:
            self.bars.remove_task(self._bars.pop(name))
        shares = 0.0
        for job in jobs:
            if job.name not in self._bars:
                self._bars[job.name] = self.bars.add_task(job.name, total=1, text='')
            share, text = job.progress()
            shares += share
            self.bars.update(self._bars[job.name], completed=share, text=text)
        text = f'{self._done} of {self._total} done'
        self.bars.update(self._all, completed=self._done + shares, text=text)

    def finished(self, job: Job, result: str) -> None:
        """Count one more.

        Args:
            job (Job): What has ended.
            result (str): How, in a word or two.
        """
        self._done += 1
        self.say(f'{job.name} is done: {result}')


class Interrupts:
    """Notes SIGINT, SIGTERM and SIGHUP, so that a loop can end in order.

    Attributes:
        name (str): Name of the last signal; empty without one.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> 'Interrupts':
        self.name = ''
        self._before = [signal.signal(n, self._note) for n in self.SIGNALS]
        return self

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def __exit__(self, kind: Optional[type], *error: object) -> None:
        for number, handler in zip(self.SIGNALS, self._before):
            signal.signal(number, handler)
        if self.name and kind is None:
            raise SystemExit(
                f'stopped by {self.name}; the same command goes on from the last '
                'checkpoints'
            )


class LocalRuns:
    """Runs on this machine.

    Args:
        jobs (Sequence[Job]): The runs, each after the one that it starts from.
        slots (int): How many run side by side.
        threads (int): Threads of each.
        retries (int): How often a run that died is started again.
        describe (Callable[[Job], str]): What to say of a run that finished.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: int,
        threads: int,
        retries: int,
        describe: Callable[[Job], str],
    ) -> None:
        gpus = visible_gpus()
        self._devices = [gpus[i % len(gpus)] if gpus else None for i in range(slots)]
        self._threads, self._retries, self._describe = threads, retries, describe
        self._names = {job.work_dir: job.name for job in jobs}
        self._pending = [job for job in jobs if not job.done]
        self._running: Dict[int, Attempt] = {}
        self._starts: Dict[str, int] = {}
        self._waiting: Set[str] = set()
        self._failures: Failures = {}
        self._display = Display(len(jobs), len(jobs) - len(self._pending))

    def run(self) -> Failures:
        """Run them.

        Returns:
            dict[str, str]: Why runs failed, by their names.

        Raises:
            SystemExit: On SIGINT, SIGTERM and SIGHUP, after all were ended.
        """
        with Interrupts() as interrupts, self._display.bars:
            try:
                while (self._pending or self._running) and not interrupts.name:
                    self._look_at_running()
                    for job in list(self._pending):
                        first = self._names.get(job.after or '', '')
                        if first in self._failures:
                            self._fail(job, f'{first} failed')
                        elif not job.after or not first or is_done(job.after):
                            self._start(job)
                    self._display.show([a.job for a in self._running.values()])
                    time.sleep(PAUSE)
            finally:
                for attempt in self._running.values():
                    attempt.kill()
        return self._failures

    def _look_at_running(self) -> None:
        for slot, attempt in list(self._running.items()):
            code, job = attempt.poll(), attempt.job
            if code is None:
                continue
            del self._running[slot]
            tried = self._starts[job.name]
            if code == 0:
                self._display.finished(job, self._describe(job))
            elif tried <= self._retries:
                self._display.say(
                    f'{job.name} ended with {ending(code)}; it is started again '
                    f'({tried} of {self._retries})'
                )
                self._pending.insert(0, job)
            else:
                self._fail(job, f'{ending(code)}; {job.log_end()}')

    def _start(self, job: Job) -> None:
        slot = next(
            (i for i in range(len(self._devices)) if i not in self._running), -1
        )
        if slot < 0:
            return
        try:
            attempt = Attempt(job, self._threads, self._devices[slot])
        except Taken as error:
            if job.name not in self._waiting:
                self._display.say(f'{job.name} waits: {error}')
                self._waiting.add(job.name)
            return
        except (OSError, ValueError) as error:
            self._fail(job, str(error))
            return
        self._running[slot] = attempt
        self._starts[job.name] = self._starts.get(job.name, 0) + 1
        self._pending.remove(job)
        if attempt.process is not None:
            self._display.say(f'{job.name} starts: {job.work_dir}')

    def _fail(self, job: Job, reason: str) -> None:
        self._failures[job.name] = reason
        self._display.say(f'{job.name} failed: {reason}')
        if job in self._pending:
            self._pending.remove(job)


def ending(code: int) -> str:
    """How a process ended: its exit code or the signal."""
    if code >= 0:
        return f'exit code {code}'
    return f'signal {signal.Signals(-code).name}'
