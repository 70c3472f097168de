"""Plan the runs of a study, and estimate how long they take."""

import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

from mmela_light.command import find

from .run import Job


def prepare(commands: Sequence[str]) -> None:
    """Run the preparation commands of a study.

    Args:
        commands (Sequence[str]): The commands. ``{root}`` stands for the checkout and
            ``python`` for this Python.

    Raises:
        ValueError: If a command fails.
    """
    root = find('tools/train.py').parents[1]
    for command in commands:
        words = shlex.split(command.replace('{root}', shlex.quote(str(root))))
        if words and words[0] in ('python', 'python3'):
            words[0] = sys.executable
        try:
            code = subprocess.run(words, stdin=subprocess.DEVNULL).returncode
        except OSError as error:
            raise ValueError(f'preparation {command!r} failed: {error}') from error
        if code:
            raise ValueError(f'preparation {command!r} failed with exit code {code}')


def estimates(jobs: Sequence[Job], all_jobs: Sequence[Job]) -> Dict[str, float]:
    """Estimate the remaining time of runs.

    The pace is the median time per epoch or iteration of finished runs of the same
    variant, or else of all variants of the study.

    Args:
        jobs (Sequence[Job]): Runs to estimate.
        all_jobs (Sequence[Job]): Runs to learn from.

    Returns:
        dict[str, float]: Seconds by work directory, without runs that cannot be
        estimated.
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
    """Epochs or iterations already done in the checkpoint that a run resumes from."""
    if job.start is None or job.start.how != 'resume':
        return 0
    number = Path(job.start.checkpoint).stem.rpartition('_')[2]
    return min(int(number), job.length - 1) if number.isdigit() else 0


def duration(seconds: float) -> str:
    """Format seconds for a reader: ``1 h 05 min``."""
    if seconds < 60:
        return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    return (
        f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60:02} min'
    )


def plan(jobs: Sequence[Job], all_jobs: Sequence[Job], slots: int) -> Iterator[str]:
    """Describe the runs of a study without running them.

    Args:
        jobs (Sequence[Job]): The runs.
        all_jobs (Sequence[Job]): Runs to learn times from.
        slots (int): Number of parallel runs.

    Yields:
        str: A line of the plan.
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
                text += f', continues from {checkpoint.name}'
            elif job.start:
                start = job.start
                text += f', {start.how} {start.checkpoint} of {start.variant}'
        yield text.rstrip()
    yield f'{len(jobs) - len(left)} of {len(jobs)} runs done, {slots} in parallel'
    if left and len(seconds) == len(left):
        # At least as long as the longest run
        total = max(sum(seconds.values()) / slots, *seconds.values())
        yield f'about {duration(total)} remaining'
    elif left:
        yield 'remaining time unknown, because no run has finished yet'
