"""The runs of a study on a Ray cluster."""

import os
import socket
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from mmela_light.command import PACKAGE

from .run import Attempt, Job, Taken
from .schedule import Display, Failures, Interrupts, ending

PAUSE = 2.0  # seconds between two looks at the cluster


def connect(address: str, threads: int, gpus: Optional[float]) -> Tuple[float, int]:
    """Connect to a cluster.

    Args:
        address (str): Address for ``ray.init``: ``auto``, ``HOST:PORT``,
            ``ray://HOST:PORT``, or ``local`` for one on this machine.
        threads (int): Threads of a run.
        gpus (float, optional): GPUs of a run. Defaults to one where the
            cluster has GPUs.

    Returns:
        tuple[float, int]: GPUs of a run, and how many fit side by side.

    Raises:
        ValueError: If Ray is not installed, there is no cluster, or no run
            fits on it.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(
            '--address needs Ray, which is not installed: pip install "ray>=2.9", or '
            'install mmela with its extra "study"'
        ) from None
    # Workers import the mmela of this process, from the shared file system
    paths = filter(None, [str(PACKAGE.parent), os.environ.get('PYTHONPATH')])
    environ = {'env_vars': {'PYTHONPATH': os.pathsep.join(paths)}}
    host, _, port = address.replace('ray://', '').rpartition(':')
    try:
        if host and port.isdigit():  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, runtime_env=environ, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f'no Ray cluster at {address!r}: {error}') from error
    has = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if has.get('GPU', 0) else 0.0
    # A run is on one node, so the sum over nodes of what fits on each
    slots = 0
    for node in ray.nodes():
        if node['Alive']:
            fits = [node['Resources'].get('CPU', 0) // threads]
            fits += [node['Resources'].get('GPU', 0) // gpus] if gpus else []
            slots += int(min(fits))
    if not slots:
        raise ValueError(
            f'no node of the cluster has {threads} CPUs and {gpus:g} GPUs for a run; '
            f'the cluster has {has.get("CPU", 0):g} CPUs, {has.get("GPU", 0):g} GPUs'
        )
    return gpus, slots


def train(job: Job, threads: int, retries: int, failed: Optional[str]) -> Optional[str]:
    """Train on a node of the cluster.

    Args:
        job (Job): The run.
        threads (int): Threads that it may use.
        retries (int): How often a process that died is started again.
        failed (str | None): Why the run that it starts from failed.

    Returns:
        str | None: Why it failed, if it did.
    """
    if failed is not None:
        return 'the run that it starts from failed'
    reason = None
    for _ in range(retries + 1):
        attempt = None
        while attempt is None:
            try:
                attempt = Attempt(job, threads)
            except Taken:  # by what another driver runs, or what is about to end
                time.sleep(PAUSE)
            except (OSError, ValueError) as error:
                return str(error)
        try:
            while True:
                code = attempt.poll()
                if code is not None:
                    break
                time.sleep(0.5)
        finally:
            attempt.kill()
        if code == 0:
            return None
        reason = f'{ending(code)}; {job.log_end()}'
    return reason


def run_ray(
    jobs: Sequence[Job],
    threads: int,
    gpus: float,
    retries: int,
    describe: Callable[[Job], str],
) -> Failures:
    """Run on the cluster that :func:`connect` has connected to.

    Args:
        jobs (Sequence[Job]): The runs, each after the one that it starts from.
        threads (int): Threads of each.
        gpus (float): GPUs of each.
        retries (int): How often a run that died is started again.
        describe (Callable[[Job], str]): What to say of a run that finished.

    Returns:
        dict[str, str]: Why runs failed, by their names.

    Raises:
        SystemExit: On SIGINT, SIGTERM and SIGHUP, after all runs were ended.
    """
    import ray

    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=retries)(train)
    left = [job for job in jobs if not job.done]
    display = Display(len(jobs), len(jobs) - len(left))
    failures: Failures = {}
    refs: Dict[str, Any] = {}
    owners: Dict[Any, Job] = {}
    with Interrupts() as interrupts, display.bars:
        try:
            for job in left:
                # Ray starts a task when what it is given is there.
                first = refs.get(job.after) if job.after else None
                ref = task.remote(job, threads, retries, first)
                refs[job.work_dir], owners[ref] = ref, job
            while owners and not interrupts.name:
                ended, _ = ray.wait(list(owners), timeout=PAUSE)
                for ref in ended:
                    job = owners.pop(ref)
                    reason = _result(ray, ref)
                    if reason is None:
                        display.finished(job, describe(job))
                    else:
                        failures[job.name] = reason
                        display.say(f'{job.name} failed: {reason}')
                display.show([job for job in owners.values() if _runs(job)])
        finally:
            for ref in owners:
                ray.cancel(ref, force=True)
    return failures


def _result(ray: Any, ref: Any) -> Optional[str]:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:  # what Ray's retries did not mend
        return f'{type(error).__name__}: {" ".join(str(error).split())[:500]}'


def _runs(job: Job) -> bool:
    attempts: List[dict] = job.record.get('attempts', [])
    return bool(attempts) and attempts[-1]['seconds'] is None
