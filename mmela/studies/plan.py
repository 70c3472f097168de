"""What would be run, and how long it takes."""

import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

from mmela_light.command import find

from .run import Job


def prepare(commands: Sequence[str]) -> None:
    """Run the commands of a study that come before all runs.

    Args:
        commands (Sequence[str]): The commands; ``{root}`` is the checkout, and
            ``python`` this Python.

    Raises:
        ValueError: If one fails.
    """
    root = find('tools/train.py').parents[1]
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
        seconds = [attempt.seconds for attempt in record.attempts]
        if record.done and seconds and None not in seconds:
            pace = sum(seconds) / (job.length - first_step(job))
            paces.setdefault((job.variant, job.unit), []).append(pace)
    left = {}
    for job in jobs:
        same = paces.get((job.variant, job.unit))
        others = [p for (_, unit), ps in paces.items() if unit == job.unit for p in ps]
        if not same and not others:
            continue
        checkpoint = job.checkpoint()
        begun = int(checkpoint.stem.split('_')[1]) if checkpoint else first_step(job)
        left[job.work_dir] = statistics.median(same or others) * (job.length - begun)
    return left


def first_step(job: Job) -> int:
    """Epoch or iteration that a run starts after, by what it resumes from."""
    if job.start is None or job.start.how != 'resume':
        return 0
    number = Path(job.start.checkpoint).stem.rpartition('_')[2]
    return min(int(number), job.length - 1) if number.isdigit() else 0


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
                text += f', {start.how} {start.checkpoint} of {start.variant}'
        yield text.rstrip()
    yield f'{len(jobs) - len(left)} of {len(jobs)} runs done, {slots} side by side'
    if left and len(seconds) == len(left):
        # No earlier than the longest of them
        total = max(sum(seconds.values()) / slots, *seconds.values())
        yield f'about {duration(total)} to go'
    elif left:
        yield 'time to go unknown: no finished run tells how long an epoch takes'
