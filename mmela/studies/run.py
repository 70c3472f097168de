"""One run of a study: a training in a process of its own."""

import ctypes
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

from mmela_light.command import PACKAGE, find

from .. import __version__
from ..analysis.work_dir import Run
from .study import Study, flatten

RECORD = 'study_run.json'
LOG = 'study.log'
_STEP = re.compile(r'(?:Epoch|Iter)\(train\)\s+(?:\[ *(\d+)\])?\[ *(\d+)/(\d+)\]')
_PDEATHSIG = 1  # of linux/prctl.h


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
        start (dict | None): Variant, checkpoint and how to start from it.
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
    start: Optional[dict]
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
    def record(self) -> Dict[str, Any]:
        """dict: What the runner noted: settings, attempts, whether it is done."""
        return read_record(self.work_dir)

    def write(self, record: Dict[str, Any]) -> None:
        """Write the record, at once or not at all."""
        path = self.folder / RECORD
        temporary = path.with_suffix('.tmp')
        temporary.write_text(json.dumps(record, indent=1), 'utf-8')
        os.replace(temporary, path)

    @property
    def done(self) -> bool:
        """bool: Whether it has finished."""
        return is_done(self.work_dir)

    def changes(self) -> List[str]:
        """Compare what there is with what the study asks for.

        Returns:
            list[str]: A line for each setting that differs.
        """
        record = self.record
        if not self.done and not any(self.folder.glob('*.pth')):
            return []  # nothing that would be mixed or lost
        if record.get('settings') is None:
            return ['it was not made by a study, so its settings are unknown']
        old = flatten({**record['settings'], 'start': record['start']})
        new = flatten({**self.settings, 'start': self.start})
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

    def validated(self) -> bool:
        """Whether the validation at the end is there."""
        results = self.results()
        return results is not None and max(results.metrics, default=0) >= self.length

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
        """Whether an earlier process trained it to the end, but noted nothing."""
        last = self.folder / f'{self.unit}_{self.length}.pth'
        return zipfile.is_zipfile(last) and self.validated()

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


def read_record(work_dir: str) -> Dict[str, Any]:
    """What the runner noted in a work directory."""
    path = Path(work_dir, RECORD)
    return json.loads(path.read_text('utf-8')) if path.is_file() else {}


def is_done(work_dir: str) -> bool:
    """Whether the run in a work directory has finished."""
    return bool(read_record(work_dir).get('done'))


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
                    tool or str(find('train.py')),
                    str(variant.config),
                    (*variant.options, f'randomness.seed={seed}'),
                    str(root / start.variant / f'seed_{seed}') if start else None,
                    dict(vars(start)) if start else None,
                    {**variant.settings, 'randomness': seeded},
                    variant.unit,
                    variant.length,
                )
            )
    return jobs


class Taken(Exception):
    """Another process has the run."""


class Attempt:
    """A process that trains a run.

    It holds a lock on the work directory as long as it lives, and dies with
    the process that made it.

    Args:
        job (Job): The run.
        threads (int): Threads that it may use.
        device (str, optional): Its ``CUDA_VISIBLE_DEVICES``. Defaults to None,
            what is visible here.

    Raises:
        Taken: If another process trains it.
        OSError: If the checkpoint that it starts from is not there.
    """

    def __init__(self, job: Job, threads: int, device: Optional[str] = None) -> None:
        self.job = job
        self.process: Optional[subprocess.Popen] = None  # None if it is done
        self._code: Optional[int] = None
        job.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(job.folder / '.study.lock', os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise Taken(f'another process has {job.folder}') from None
        try:
            self._begin(threads, device)
        except BaseException:
            os.close(self._lock)
            raise

    def _begin(self, threads: int, device: Optional[str]) -> None:
        job, record = self.job, self.job.record
        log = job.folder / LOG
        attempts = record.get('attempts', [])
        for attempt in attempts:  # of a process that was killed
            if attempt['seconds'] is None and log.exists():
                attempt['seconds'] = log.stat().st_mtime - attempt['started']
        checkpoint = job.checkpoint()
        complete = job.done or job.is_complete()
        made = dict(settings=job.settings, start=job.start)
        if complete or checkpoint is not None:  # what it began with
            made = {key: record.get(key) for key in made}
        record = {**made, 'done': complete, 'attempts': attempts}
        if complete:
            job.write(record)
            self._end(0)
            return
        environ = dict(os.environ)
        environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        # The mmela of this process; and what deterministic cuBLAS asks for
        paths = [str(PACKAGE.parent), environ.get('PYTHONPATH', '')]
        environ['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
        environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        if device is not None:
            environ['CUDA_VISIBLE_DEVICES'] = device
        command = self._command(checkpoint)
        now = dict(started=time.time(), seconds=None, exit=None, machine=machine())
        attempts.append({**now, 'threads': threads})
        job.write(record)
        libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
        driver = os.getpid()

        def die_with_driver() -> None:
            if libc is not None:
                libc.prctl(_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != driver:
                os._exit(1)

        with open(log, 'ab') as output:
            output.write(f'$ {" ".join(command)}\n'.encode())
            output.flush()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=job.cwd,
                env=environ,
                pass_fds=[self._lock],
                start_new_session=True,
                preexec_fn=die_with_driver,
            )

    def _command(self, checkpoint: Optional[Path]) -> List[str]:
        job, options = self.job, list(self.job.options)
        command = [sys.executable, job.tool, job.config]
        command += ['--work-dir', job.work_dir]
        if checkpoint is not None:
            command += ['--resume', str(checkpoint)]
        elif job.start is not None and job.after is not None:
            path = Path(job.after, job.start['checkpoint'])
            if not path.is_file():
                raise FileNotFoundError(f'{job.name} starts from {path}: no such file')
            if job.start['how'] == 'resume':
                command += ['--resume', str(path)]
            else:
                options.append(f'load_from={path}')
        return [*command, '--cfg-options', *options]

    def poll(self) -> Optional[int]:
        """End of the process: its exit code, None while it goes on."""
        if self._code is None and self.process is not None:
            code = self.process.poll()
            if code is not None:
                self._end(code)
        return self._code

    def kill(self) -> None:
        """End the process and those that it started."""
        if self.poll() is None and self.process is not None:
            self._kill_group(self.process.pid)
            self._end(self.process.wait())

    @staticmethod
    def _kill_group(number: int) -> None:
        try:
            os.killpg(number, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _end(self, code: int) -> None:
        if self.process is not None:
            # Loaders of data that have outlived it hold the lock
            self._kill_group(self.process.pid)
            record = self.job.record
            last = record['attempts'][-1]
            last.update(seconds=time.time() - last['started'], exit=code)
            self.job.write({**record, 'done': code == 0})
        self._code = code
        os.close(self._lock)


@lru_cache(maxsize=None)
def machine() -> Dict[str, Any]:
    """What a run was made on: processor, versions, revision."""
    model = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        text = Path('/proc/cpuinfo').read_text('utf-8', 'replace')
        found = re.search(r'^model name\s*: *(.+)$', text, re.MULTILINE)
        model = found.group(1) if found else model
    # Not asked by torch, which would take memory on the GPU
    gpu = _output('nvidia-smi', '--query-gpu=name', '--format=csv,noheader')
    return dict(
        cpu=model,
        cores=os.cpu_count(),
        gpu=gpu.splitlines()[0] if gpu else None,
        torch=torch.__version__,
        mmela=__version__,
        revision=_revision(),
    )


def _revision() -> Optional[str]:
    git = ('git', '-C', str(PACKAGE.parent))
    revision = _output(*git, 'rev-parse', '--short=12', 'HEAD')
    changed = _output(*git, 'status', '--porcelain', '--untracked-files=no')
    return revision and revision + ('+changes' if changed else '')


def _output(*command: str) -> Optional[str]:
    """What a command prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
