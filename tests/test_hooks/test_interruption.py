"""Runs killed with SIGKILL end, once resumed, as if nothing had happened."""

import json
import signal

import pytest
import torch

import mmela  # noqa: F401
from tests.helpers.fresh import check, run
from tests.helpers.toy import toy_config

POLICY = dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.9)
HOOK = dict(windows=[(2, 3), (5, 5)], policy=POLICY)

# Kill the process at a given place, the first time that it gets there.
SCRIPT = """
import os, signal, sys
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tests.test_hooks.test_interruption import config
from tests.helpers.toy import train

work_dir, place, epoch = sys.argv[1], sys.argv[2], int(sys.argv[3])
marker = work_dir + '.killed'


def kill():
    if not os.path.exists(marker):
        open(marker, 'w').close()
        os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class Killer(Hook):
    # After the pruning hook and before the checkpoint is saved
    priority = 'LOW'

    def after_train_iter(self, runner, batch_idx, **kwargs):
        if (place, epoch, 1) == ('iteration', runner.epoch + 1, batch_idx):
            kill()

    def after_train_epoch(self, runner):
        if (place, epoch) == ('pruned', runner.epoch + 1):
            kill()


save = torch.save


def half_save(obj, file, *args, **kwargs):
    if (place, epoch) == ('writing', obj['meta']['epoch']):
        save(obj, file, *args, **kwargs)
        if hasattr(file, 'getvalue'):  # mmengine writes a buffer to the file
            with open(f'{work_dir}/epoch_{epoch}.pth', 'wb') as partial:
                partial.write(file.getvalue()[:len(file.getvalue()) // 2])
        kill()
    save(obj, file, *args, **kwargs)


torch.save = half_save
torch.set_num_threads(1)
train(config(work_dir, resume=True), custom_hooks=[
    *config(work_dir).custom_hooks, dict(type='Killer')])
"""


def config(work_dir, **kwargs):
    return toy_config(work_dir, HOOK, epochs=6, **kwargs)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('whole') / 'run'
    process = run(SCRIPT, work_dir, 'nowhere', 0)
    assert process.returncode == 0, process.output[-2000:]
    return work_dir


@pytest.mark.parametrize('place', ['iteration', 'writing', 'pruned'])
def test_killed_and_resumed(tmp_path, uninterrupted, place):
    """In epoch 3: within the window, while saving, and after the pruning."""
    work_dir = tmp_path / 'run'
    killed = run(SCRIPT, work_dir, place, 3)
    assert killed.returncode == -signal.SIGKILL, killed.output[-2000:]
    resumed = run(SCRIPT, work_dir, place, 3)
    assert resumed.returncode == 0, resumed.output[-2000:]

    assert json.loads((work_dir / 'pruning.json').read_text()) == json.loads(
        (uninterrupted / 'pruning.json').read_text()
    )
    found, expected = [
        torch.load(path / 'epoch_6.pth')['state_dict']
        for path in (work_dir, uninterrupted)
    ]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert any(v for k, v in found.items() if k.endswith('layer_attn.state'))


def test_killed_at_random():
    """A few; tests/helpers/kills.py does hundreds, of all kinds of runs.

    From a fresh process, because it forks: a fork of one with threads can hang.
    """
    out = check(
        'from tests.helpers.kills import campaign\n'
        "found = campaign(0, 4, ['plain', 'iterations', 'two ranks', 'study'])\n"
        "print('kills:', sum(kills for kills, _ in found.values()))\n"
    )
    assert int(out.rpartition('kills:')[2]) >= 4
