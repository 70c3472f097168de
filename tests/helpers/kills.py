"""Kill runs and studies at random moments, and resume them until they end.

A killed run must end like one without a kill: with the same decisions in
``pruning.json`` and bit for bit the same weights. A killed study must have the same
numbers, with each epoch trained once. Each process is forked from one that has imported
everything, so that a kill hits the training and not the imports.

A test runs this; for larger counts, run:
  python -m tests.helpers.kills SEED COUNT [NAME ...]
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from mmela.studies import driver
from tests.helpers.runs import HOOK, POLICY
from tests.helpers.studies import tiny_jobs
from tests.helpers.toy import toy_config, train

STEPS = dict(by_epoch=False, max_iters=12)
TWO = dict(
    batch_size=2,
    launcher='pytorch',
    model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None),
)


def optimizer(**kwargs):
    return dict(optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.001), **kwargs))


def checkpoints(**kwargs):
    return dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', **kwargs)))


def sampled(cfg):
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    return cfg


def averaged(cfg):
    cfg.custom_hooks.append(dict(type='EMAHook', ema_type='ExponentialMovingAverage'))
    return cfg


# Number of processes, pruning hook, other settings and a last change, by name
RUNS = {
    'plain': (1, HOOK, {}, None),
    'long window': (1, dict(HOOK, windows=[(2, 4)]), {}, None),
    'values kept': (1, dict(HOOK, keep_value=True), {}, None),
    'mean distribution': (1, dict(HOOK, reduction='mean_distribution'), {}, None),
    'put off': (1, dict(windows=[(1, 1)], policy=POLICY, put_off_until=4), {}, None),
    'by chance': (
        1,
        dict(HOOK, policy=dict(type='FixedCount', count=1, criterion='random')),
        {},
        None,
    ),
    'each other epoch': (1, HOOK, checkpoints(interval=2, max_keep_ckpts=2), None),
    'accumulation': (1, HOOK, optimizer(accumulative_counts=3), None),
    'schedule': (1, HOOK, dict(param_scheduler=dict(type='CosineAnnealingLR')), None),
    'average': (1, HOOK, {}, averaged),
    'MLA': (1, HOOK, dict(layer_attention='MLA'), None),
    'iterations': (
        1,
        dict(windows=[(2, 5), (8, 8)], policy=POLICY, by_epoch=False),
        dict(train_cfg=STEPS, **checkpoints(by_epoch=False, interval=2)),
        sampled,
    ),
    'two ranks': (2, HOOK, TWO, None),
    'two ranks, long window': (2, dict(HOOK, windows=[(2, 4)]), TWO, None),
}


class Processes:
    """Processes of one start of a run, or the driver of a study."""

    def __init__(self, count, target, log):
        self.alive = [self._fork(target, rank, log) for rank in range(count)]
        self.codes = []

    @staticmethod
    def _fork(target, rank, log):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            with open(log, 'a') as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.setpgid(0, 0)
            target(rank)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self):
        """Whether all processes have ended."""
        for pid in list(self.alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.alive.remove(pid)
                self.codes.append(os.waitstatus_to_exitcode(status))
        return not self.alive

    def kill(self, rng):
        """Kill one process, and the others soon after, like a launcher does."""
        for pid in rng.sample(self.alive, len(self.alive)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while not self.poll():
            time.sleep(0.005)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def start_run(name, work_dir, port, rank):
    """Start or resume a run of :data:`RUNS`."""
    count, hook, kwargs, change = RUNS[name]
    torch.set_num_threads(1)
    if count > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        torch.distributed.init_process_group('gloo', rank=rank, world_size=count)
    settings = dict(dict(epochs=5, norm_eval=True, resume=True), **kwargs)
    cfg = toy_config(work_dir, hook, **settings)
    train(change(cfg) if change else cfg)


def result_of_run(work_dir):
    """Get the decisions and weights of a finished run."""
    last = (Path(work_dir) / 'last_checkpoint').read_text()
    checkpoint = torch.load(Path(work_dir) / Path(last).name)
    weights = dict(checkpoint['state_dict'], **checkpoint.get('ema_state_dict', {}))
    decisions = json.loads((Path(work_dir) / 'pruning.json').read_text())
    return decisions['decisions'], {k: v.tolist() for k, v in weights.items()}


def start_study(work_dir, rank):
    driver.PAUSE = 0.02
    failures = driver.run_all(
        study_jobs(work_dir),
        driver.LocalExecutor(2),
        driver.Limits(retries=3),
        lambda job: 'well',
    )
    assert not failures, failures


def study_jobs(work_dir):
    Path(work_dir).mkdir(exist_ok=True)
    return tiny_jobs(Path(work_dir), seeds=(0, 1))[1]


def result_of_study(work_dir):
    """Get the numbers of a study, and its epochs in the order of training."""
    return [(job.name, job.done, job.results().metrics) for job in study_jobs(work_dir)]


def attempt(name, folder, kill_after, rng, port):
    """Start, kill after ``kill_after`` seconds; whether it has ended by itself."""
    log = f'{folder}.log'
    if name == 'study':
        processes = Processes(1, lambda rank: start_study(folder, rank), log)
    else:
        processes = Processes(
            RUNS[name][0], lambda rank: start_run(name, folder, port, rank), log
        )
    begun = time.monotonic()
    while not processes.poll():
        time.sleep(0.002)
        seconds = time.monotonic() - begun
        if kill_after is not None and seconds > kill_after:
            processes.kill(rng)
            return False, seconds
        if seconds > 300:
            processes.kill(rng)
            raise AssertionError(f'{name}: hangs; {Path(log).read_text()[-2000:]}')
    if any(processes.codes):
        raise AssertionError(f'{name}: {Path(log).read_text()[-3000:]}')
    return True, time.monotonic() - begun


def campaign(seed, count, names=(), most=3):
    """Repeat runs until a total number of kills is reached.

    Args:
        seed (int): Seed of the random moments.
        count (int): Total number of kills.
        names (Sequence[str]): Names in :data:`RUNS`, or ``'study'``. Defaults to all.
        most (int): Maximum number of kills of one run.

    Returns:
        dict[str, list[int]]: Numbers of kills and of successful runs, by name.

    Raises:
        AssertionError: If a run fails, or its result differs from one without a kill.
    """
    rng = random.Random(seed)
    names = list(names) or [*RUNS, 'study']
    kills, ended = Counter(), Counter()
    whole, lasts = {}, {}
    with tempfile.TemporaryDirectory() as root:
        number = 0
        while sum(kills.values()) < count:
            name = names[number % len(names)]
            number += 1
            result = result_of_study if name == 'study' else result_of_run
            if name not in whole:
                folder = f'{root}/whole_{number}'
                _, lasts[name] = attempt(name, folder, None, rng, free_port())
                whole[name] = result(folder)
                assert whole[name]
            folder = f'{root}/{number}'
            for _ in range(rng.randint(1, most)):
                after = rng.uniform(0, lasts[name])
                done, _ = attempt(name, folder, after, rng, free_port())
                if done:
                    break
                kills[name] += 1
            else:
                attempt(name, folder, None, rng, free_port())
            found = result(folder)
            assert found == whole[name], f'{name}, seed {seed}, run {number} differs'
            ended[name] += 1
            shutil.rmtree(folder)
            if '-v' in sys.argv:
                print(number, name, dict(kills), flush=True)
    return {name: [kills[name], ended[name]] for name in names}


if __name__ == '__main__':
    words = [word for word in sys.argv[1:] if word != '-v']
    table = campaign(int(words[0]), int(words[1]), words[2:])
    print(json.dumps(table))
    print(f'{sum(kills for kills, _ in table.values())} kills')
