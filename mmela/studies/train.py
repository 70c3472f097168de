"""Train one run in a process, and restart the process if it dies."""

import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import List, Optional

import torch
from filelock import FileLock, Timeout

from mmela_light.command import PACKAGE

from .. import __version__
from .run import LOG, Attempt, Job, Machine

CHILD = Path(__file__).with_name('child.py')
LOCK = '.study.lock'
PATIENCE = 10  # seconds to wait for a killed process to end


@dataclass(frozen=True)
class Limits:
    """Limits of a run.

    Attributes:
        threads (int): Number of threads of a process.
        retries (int): Maximum number of restarts after a process died.
        hours (float): Time limit of a process.
    """

    threads: int = 1
    retries: int = 2
    hours: float = 168.0


def train(
    job: Job,
    limits: Limits,
    device: Optional[str] = None,
    stop: Optional[threading.Event] = None,
) -> Optional[str]:
    """Train a run to its end, from its last checkpoint if it has one.

    Args:
        job (Job): The run. If it is complete, nothing happens.
        limits (Limits): Its limits.
        device (str, optional): Its ``CUDA_VISIBLE_DEVICES``. Defaults to None, which
            keeps the current value.
        stop (threading.Event, optional): Event that ends the run. Defaults to None.

    Returns:
        str | None: The reason if it failed.

    Raises:
        OSError: If the checkpoint that it starts from does not exist.
        ValueError: If its record is damaged.
    """
    stop = stop or threading.Event()
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.folder / LOCK, timeout=PATIENCE):
            for _ in range(limits.retries + 1):
                if stop.is_set():
                    return 'it was stopped'
                attempt = _attempt(job, limits, device, stop)
                if attempt is None or attempt.exit == 0:
                    return None
    except Timeout:
        return f'another process is training in {job.folder}'
    return f'{ending(attempt)}; {job.log_end()}'


def _attempt(
    job: Job, limits: Limits, device: Optional[str], stop: threading.Event
) -> Optional[Attempt]:
    """Train with one process; None if nothing is left to do."""
    record, log = job.record, job.folder / LOG
    for earlier in record.attempts:  # of a killed driver
        if earlier.seconds is None and log.exists():
            earlier.seconds = max(0.0, log.stat().st_mtime - earlier.started)
    checkpoint = job.checkpoint()
    if job.is_complete():
        record.done = True
        job.write(record)
        return None
    if checkpoint is None:  # otherwise keep the initial settings
        record.settings, record.start = job.settings, job.start
    command = _command(job, checkpoint)
    attempt = Attempt(time.time(), machine(), limits.threads)
    record.attempts.append(attempt)
    job.write(record)
    with open(log, 'ab') as output:
        output.write(f'$ {" ".join(command)}\n'.encode())
        output.flush()
        process = subprocess.Popen(
            [sys.executable, str(CHILD), *command[1:]],
            stdin=subprocess.PIPE,  # the process ends when this closes
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=job.cwd,
            env=_environ(limits.threads, device),
            start_new_session=True,
        )
    end = time.monotonic() + 3600 * limits.hours
    try:
        while process.poll() is None and not stop.wait(0.1):
            if time.monotonic() > end:
                attempt.timed_out = True
                break
    finally:
        _kill(process)
        attempt.exit = process.wait()
        attempt.seconds = time.time() - attempt.started
        record.done = attempt.exit == 0
        job.write(record)
    return attempt


def _command(job: Job, checkpoint: Optional[Path]) -> List[str]:
    options = list(job.options)
    command = [sys.executable, job.tool, job.config, '--work-dir', job.work_dir]
    if checkpoint is None and job.start is not None and job.after is not None:
        origin = Path(job.after, job.start.checkpoint)
        if not origin.is_file():
            raise FileNotFoundError(
                f'{job.name} starts from {origin}, which does not exist'
            )
        if job.start.how == 'resume':
            checkpoint = origin
        else:
            options.append(f'load_from={origin}')
    if checkpoint is not None:
        command += ['--resume', str(checkpoint)]
    return [*command, '--cfg-options', *options]


def _environ(threads: int, device: Optional[str]) -> dict:
    environ = dict(os.environ)
    environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    # Use the same mmela; deterministic cuBLAS needs the workspace setting
    paths = [str(PACKAGE.parent), environ.get('PYTHONPATH', '')]
    environ['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
    environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if device is not None:
        environ['CUDA_VISIBLE_DEVICES'] = device
    return environ


def _kill(process: subprocess.Popen) -> None:
    """Kill a process and its data loader workers."""
    if hasattr(os, 'killpg'):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.kill()
    process.stdin.close()


def ending(attempt: Attempt) -> str:
    """Describe how a process ended: exit code, signal or time limit."""
    if attempt.timed_out:
        return 'the time limit'
    if attempt.exit is None or attempt.exit >= 0:
        return f'exit code {attempt.exit}'
    return f'signal {signal.Signals(-attempt.exit).name}'


@lru_cache(maxsize=None)
def machine() -> Machine:
    """Describe this machine and its software."""
    model = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        text = Path('/proc/cpuinfo').read_text('utf-8', 'replace')
        match = re.search(r'^model name\s*: *(.+)$', text, re.MULTILINE)
        model = match.group(1) if match else model
    # Not through torch, which would allocate memory on the GPU
    gpu = _output('nvidia-smi', '--query-gpu=name', '--format=csv,noheader')
    git = ('git', '-C', str(PACKAGE.parent))
    revision = _output(*git, 'rev-parse', '--short=12', 'HEAD')
    if revision and _output(*git, 'status', '--porcelain', '--untracked-files=no'):
        revision += '+changes'
    return Machine(
        cpu=model,
        cores=os.cpu_count(),
        gpu=gpu.splitlines()[0] if gpu else None,
        torch=str(torch.__version__),
        mmela=__version__,
        revision=revision,
    )


def _output(*command: str) -> Optional[str]:
    """Output of a command; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
