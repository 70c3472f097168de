"""What gpu.py runs, imported once for all of its processes."""

import argparse
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import List

import torch
import torch.distributed
from mmengine.model import MMDistributedDataParallel

import mmela  # noqa: F401

from . import hook_overhead as _hook_overhead
from . import inference as _inference
from . import networks
from . import train_step as _train_step
from . import tune as _tune
from .common import machine, set_up, summary, synchronize, write_results

for toolbox in ('mmpretrain', 'mmdet'):
    if find_spec(toolbox):
        __import__(f'{toolbox}.models')

ROOT = Path(__file__).resolve().parents[2]
TESTS = ('tests/test_gpu.py', 'tests/helpers/triton_cases.py')

train_step = _train_step.main
inference = _inference.main
hook_overhead = _hook_overhead.main


def tune(argv: List[str]) -> None:
    """Tune; what is chosen goes where the parts after it read it."""
    _tune.main([*argv, '--blocks', os.environ['MMELA_TRITON_BLOCKS']])


def device(argv: List[str]) -> None:
    """Describe the device, which must be able to start here.

    Args:
        argv (list[str]): ``--out FILE``.
    """
    name = 'cuda' if os.environ.get('CUDA_VISIBLE_DEVICES') != '' else 'cpu'
    found = torch.device(name)
    torch.zeros(1, device=found)
    write_results(argv[-1], dict(tool='device', machine=machine(found)), tell=False)


def checks(argv: List[str]) -> None:
    """Run the tests for a GPU.

    Args:
        argv (list[str]): Arguments of pytest, then ``--out FILE``, which gets
            ``summary``, ``passed``, ``skipped`` and ``failed``, also of tests
            that ran before this was stopped.
    """
    *arguments, _, out = argv
    process = subprocess.Popen(
        [sys.executable, '-m', 'pytest', '-v', '--tb=short', '-p', 'no:cacheprovider']
        + [*arguments, *TESTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    names = dict(PASSED='passed', SKIPPED='skipped', FAILED='failed', ERROR='failed')
    found: dict = dict(tool='checks', passed=0, skipped=0, failed=[], complete=False)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end='', flush=True)
        match = re.match(r'(\S+::\S+) (PASSED|SKIPPED|FAILED|ERROR)', line)
        if match:
            name, key = match[1], names[match[2]]
            found[key] = (
                [*found[key], f'- FAILED {name}'] if key == 'failed' else found[key] + 1
            )
            _summarize(out, found)
    code = process.wait()
    found['complete'] = code in (0, 1)
    if not found['complete']:
        found['failed'].append(f'- pytest ended with {code}')
    _summarize(out, found)


def _summarize(out: str, found: dict) -> None:
    found['summary'] = (
        f'{found["passed"]} passed, {len(found["failed"])} failed, '
        f'{found["skipped"]} skipped' + ('' if found['complete'] else ', not all run')
    )
    write_results(out, found, tell=False)


def rewrap(argv: List[str]) -> None:
    """Time a new DDP wrapper, as after a pruning, in a group of this process.

    Args:
        argv (list[str]): ``--net NET --out FILE``.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument('--net')
    parser.add_argument('--out')
    options = parser.parse_args(argv)
    args = _train_step.parse_args(['--net', options.net, '--batch', '2'])
    device = set_up(args)
    networks.complete_options(args, device)
    contestant = networks.Contestant('ela', args, device, weights={})
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    torch.distributed.init_process_group(
        backend, init_method=f'file://{options.out}.store', rank=0, world_size=1
    )
    wrap = partial(MMDistributedDataParallel, contestant.model)
    kept = [wrap()]
    loss = contestant.model.parse_losses(kept[0](**contestant.batch, mode='loss'))[0]
    loss.backward()
    times = []
    for _ in range(10):
        kept.clear()  # the old reducer goes first, as after a pruning
        synchronize(device)
        start = perf_counter()
        kept.append(wrap())
        synchronize(device)
        times.append(perf_counter() - start)
    torch.distributed.destroy_process_group()
    results = dict(summary(times), tool='rewrap', net=options.net, backend=backend)
    write_results(options.out, results, tell=False)
