"""Run the runs of a study in parallel, on this machine or on a Ray cluster."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Callable, Collection, Dict, Iterator, List, Optional, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mmela_light.command import PACKAGE

from ..command_line import one_line
from .run import Job
from .train import Limits, ending, train

PAUSE = 0.5  # seconds between two checks of the runs
Failures = Dict[str, str]


def visible_gpus() -> List[str]:
    """Name of each GPU for ``CUDA_VISIBLE_DEVICES``."""
    count = torch.cuda.device_count()
    devices = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    names = [name.strip() for name in devices.split(',') if name.strip()]
    return names[:count] if names else [str(i) for i in range(count)]


def visible_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LocalExecutor(ThreadPoolExecutor):
    """Threads that each wait for a run on this machine.

    Shutting it down ends the runs.

    Args:
        slots (int): Number of parallel runs. They share the GPUs.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._stop = threading.Event()
        self._devices: SimpleQueue = SimpleQueue()
        gpus = visible_gpus() or [None]
        for i in range(slots):
            self._devices.put(gpus[i % len(gpus)])

    def submit(self, function: Callable, *args: Any) -> Future:
        """Call ``function(*args, device, stop)`` in a thread."""
        return super().submit(self._on_a_device, function, *args)

    def _on_a_device(self, function: Callable, *args: Any) -> Any:
        device = self._devices.get()
        try:
            return function(*args, device, self._stop)
        finally:
            self._devices.put(device)

    def shutdown(self, wait: bool = True, **kwargs: Any) -> None:
        """End the runs, and wait for their processes."""
        self._stop.set()
        super().shutdown(wait, **kwargs)


class RayExecutor(Executor):
    """Tasks on a Ray cluster.

    Shutting it down ends them.

    Args:
        address (str): Address for ``ray.init``: ``auto``, ``HOST:PORT``,
            ``ray://HOST:PORT``, or ``local`` for a cluster on this machine.
        limits (Limits): Limits of a run.
        gpus (float, optional): Number of GPUs per run. Defaults to one if the
            cluster has GPUs.

    Attributes:
        slots (int): Number of runs that fit in parallel.

    Raises:
        ValueError: If Ray is not installed, if there is no cluster, or if no run
            fits on it.
    """

    def __init__(
        self, address: str, limits: Limits, gpus: Optional[float] = None
    ) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError(
                '--address needs Ray, which is not installed; install it with: pip '
                'install "ray>=2.9", or "mmela[study]"'
            ) from None
        # Workers import the same mmela from the shared file system
        paths = filter(None, [str(PACKAGE.parent), os.environ.get('PYTHONPATH')])
        environ = {'env_vars': {'PYTHONPATH': os.pathsep.join(paths)}}
        host, _, port = address.replace('ray://', '').rpartition(':')
        try:
            if host and port.isdigit():  # Ray would retry for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address, runtime_env=environ, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f'there is no Ray cluster at {address!r}: {error}'
            ) from error
        has = ray.cluster_resources()
        if gpus is None:
            gpus = 1.0 if has.get('GPU', 0) else 0.0
        # A run needs a single node, so count the runs that fit on each node
        self.slots = 0
        for node in ray.nodes():
            if node['Alive']:
                fits = [node['Resources'].get('CPU', 0) // limits.threads]
                fits += [node['Resources'].get('GPU', 0) // gpus] if gpus else []
                self.slots += int(min(fits))
        if not self.slots:
            ray.shutdown()
            raise ValueError(
                f'a run needs {limits.threads} CPUs and {gpus:g} GPUs on one node, '
                f'which no node has; the cluster has {has.get("CPU", 0):g} CPUs and '
                f'{has.get("GPU", 0):g} GPUs in total'
            )
        self._ray = ray
        # Ray retries a task if a worker or a node dies
        self._task = ray.remote(
            num_cpus=limits.threads, num_gpus=gpus, max_retries=limits.retries
        )
        self._refs: List[Any] = []

    def submit(self, function: Callable, *args: Any) -> Future:
        """Call ``function(*args)`` on a node."""
        self._refs.append(self._task(function).remote(*args))
        return self._refs[-1].future()

    def shutdown(self, wait: bool = True, **kwargs: Any) -> None:
        """End the runs, and leave the cluster."""
        while self._refs:
            self._ray.cancel(self._refs.pop(), force=True)
        self._ray.shutdown()


class Display:
    """Progress bars for each run and for all runs, or plain lines without a terminal.

    Args:
        jobs (Sequence[Job]): All runs.
        retries (int): Maximum number of restarts of a run that died.
    """

    def __init__(self, jobs: Sequence[Job], retries: int) -> None:
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        columns = (
            TextColumn('{task.description}', markup=False),
            BarColumn(),
            TextColumn('{task.fields[text]}', markup=False),
            TimeElapsedColumn(),
        )
        terminal = self.console.is_terminal
        self.bars = Progress(*columns, console=self.console, disable=not terminal)
        self._all = self.bars.add_task('all runs', total=len(jobs), text='')
        self._bars: Dict[str, TaskID] = {}
        self._total, self._retries = len(jobs), retries
        self._done = sum(job.done for job in jobs)
        self._before = {job.name: len(job.record.attempts) for job in jobs}
        self._seen = dict(self._before)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(f'{time.strftime("%H:%M:%S")} {text}')

    def look(self, job: Job) -> None:
        """Print which processes of a run have started since the last call."""
        attempts = job.record.attempts
        for index in range(self._seen[job.name], len(attempts)):
            tried = index - self._before[job.name]
            if tried:
                self.say(
                    f'{job.name} ended with {ending(attempts[index - 1])}; '
                    f'restarting ({tried} of {self._retries})'
                )
            else:
                self.say(f'{job.name} starts: {job.work_dir}')
        self._seen[job.name] = len(attempts)

    def show(self, jobs: Collection[Job]) -> None:
        """Update the bars of submitted runs."""
        for job in jobs:
            self.look(job)
        if self.bars.disable:
            return
        running = [job for job in jobs if self._seen[job.name] > self._before[job.name]]
        for name in set(self._bars) - {job.name for job in running}:
            self.bars.remove_task(self._bars.pop(name))
        shares = 0.0
        for job in running:
            if job.name not in self._bars:
                self._bars[job.name] = self.bars.add_task(job.name, total=1, text='')
            share, text = job.progress()
            shares += share
            self.bars.update(self._bars[job.name], completed=share, text=text)
        text = f'{self._done} of {self._total} done'
        self.bars.update(self._all, completed=self._done + shares, text=text)

    def finished(self, job: Job, result: str) -> None:
        """Count a finished run.

        Args:
            job (Job): The run.
            result (str): A short description of its result.
        """
        self.look(job)
        self._done += 1
        self.say(f'{job.name} is done: {result}')


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into an exception, which ends the runs.

    Raises:
        SystemExit: On one of them.
    """
    numbers = [
        getattr(signal, name)
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
        if hasattr(signal, name)
    ]

    def end(number: int, frame: object) -> None:
        for each in numbers:  # let the cleanup finish
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(
            f'stopped by {signal.Signals(number).name}; run the same command again to '
            'continue from the last checkpoints'
        )

    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def run_all(
    jobs: Sequence[Job],
    executor: Executor,
    limits: Limits,
    describe: Callable[[Job], str],
) -> Failures:
    """Train all runs that are not done, each after the run that it starts from.

    Args:
        jobs (Sequence[Job]): The runs.
        executor (Executor): Executor for the runs; it is shut down at the end.
        limits (Limits): Limits of a run.
        describe (Callable[[Job], str]): Function that describes a finished run.

    Returns:
        dict[str, str]: Reasons of failures by name of the run.

    Raises:
        SystemExit: On SIGINT, SIGTERM and SIGHUP, after all runs have ended.
    """
    display = Display(jobs, limits.retries)
    waiting = [job for job in jobs if not job.done]
    running: Dict[Future, Job] = {}
    failed: Dict[str, str] = {}  # names by work directory
    failures: Failures = {}

    def fail(job: Job, reason: str) -> None:
        failed[job.work_dir], failures[job.name] = job.name, reason
        display.say(f'{job.name} failed: {reason}')

    with ended_by_signals(), executor, display.bars:
        while waiting or running:
            unfinished = {job.work_dir for job in (*waiting, *running.values())}
            for job in list(waiting):
                if job.after in unfinished:
                    continue
                waiting.remove(job)
                if job.after in failed:
                    fail(job, f'{failed[job.after]} failed')
                else:
                    running[executor.submit(train, job, limits)] = job
            ended, _ = wait(running, PAUSE, FIRST_COMPLETED)
            display.show(running.values())
            for future in ended:
                job = running.pop(future)
                try:
                    reason = future.result()
                except Exception as error:  # one run or Ray failed; others continue
                    reason = f'{type(error).__name__}: {one_line(error)[:500]}'
                if reason is None:
                    display.finished(job, describe(job))
                else:
                    fail(job, reason)
    return failures
