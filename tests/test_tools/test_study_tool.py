"""tools/study.py: from a study file to the page."""

import runpy
import sys
from pathlib import Path

import pytest

from mmela.studies import run as runs
from tests.helpers.studies import TOOL, write_study

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """Run the tool on a tiny study; its exit code and what it prints."""
    tool = runpy.run_path(str(ROOT / 'tools' / 'study.py'))
    monkeypatch.setattr(runs, 'find', lambda name: TOOL)
    monkeypatch.chdir(tmp_path)

    def call(*args, **changes):
        write_study(tmp_path, **changes)
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            tool['main'](['tiny.yml', '--work-dir', 'out', *args])
        return error.value.code, capsys.readouterr().out

    return call


def test_a_study(study, tmp_path):
    code, out = study('--dry-run')
    assert code == 0 and '0 of 4 runs done' in out
    assert not (tmp_path / 'out').exists()
    code, out = study('--jobs', '2', '--only', 'plain', '--seeds', '1')
    assert code == 0 and out.count(' starts: ') == 1
    assert 'plain seed 1 is done: accuracy/top1 ' in out
    assert (tmp_path / 'out' / 'tiny' / 'tiny.csv').is_file()
    code, out = study('--jobs', '2', '--page', 'pages')
    assert code == 0 and out.count(' starts: ') == 3
    assert '| other − plain | 2 |' in (tmp_path / 'pages' / 'tiny.md').read_text()
    (tmp_path / 'pages' / 'tiny.md').unlink()
    code, out = study('--report', '--page', 'pages')
    assert code == 0 and ' starts: ' not in out
    assert (tmp_path / 'pages' / 'tiny.md').is_file()


def test_changed_settings(study):
    assert study()[0] == 0
    changed = dict(options={'die_at': 9})
    for extra in ([], ['--dry-run']):
        code, _ = study(*extra, **changed)
        assert code.startswith('error: the settings of these runs differ')
        assert 'plain seed 0' in code and 'die_at: 0 -> 9' in code
    code, out = study('--accept-changed', **changed)
    assert code == 0 and ' starts: ' not in out and 'die_at: 0 -> 9' in out


def test_a_metric_that_is_not_there(study):
    code, out = study('--seeds', '0', metric='coco/bbox_mAP')
    assert "there is no metric 'coco/bbox_mAP', only accuracy/top1" in out


def test_a_failure(study):
    code, out = study('--retries', '0', options={'fail_at': 2})
    assert code == 1 and 'no luck in epoch 2' in out


@pytest.mark.parametrize(
    'args, names',
    [
        (['--only', 'ela'], ["'ela'", 'plain, other']),
        (['--seeds', '7'], ['7', '0, 1']),
        (['--cfg-options', 'custom_hook.0.policy=3'], ["'custom_hook'"]),
    ],
)
def test_bad_arguments(study, args, names):
    code, _ = study(*args)
    assert code.startswith('error: ')
    assert all(name in code for name in names)


@pytest.mark.parametrize(
    'args',
    [
        ['--jobs', '0'],
        ['--gpus-per-run', '1'],
        ['--address', 'a', '--jobs', '2'],
        ['--time-limit', '0'],
    ],
)
def test_arguments_that_contradict(study, args):
    assert study(*args)[0] == 2


def test_without_ray(study, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    code, _ = study('--address', 'auto')
    assert code.startswith('error: ') and 'pip install' in code


REAL = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmela', 'tests.helpers.toy', 'killer'])
model = dict(type='ToyNetwork', layer_attention=dict(type='MRLABase', head_dim=4))
train_dataloader = dict(
    dataset=dict(type='ToyDataset', size=8),
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(train_dataloader, sampler=dict(type='DefaultSampler',
                                                     shuffle=False))
val_cfg = dict()
val_evaluator = dict(type='ToyMetric')
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.0005, momentum=0.9))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval=1))
custom_hooks = [
    dict(type='LayerAttentionPruningHook', windows=[(2, 2)]), dict(type='Killer')]
"""
KILLER = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Killer(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3 and 'seed_0' in runner.work_dir:
            died = os.path.join(runner.work_dir, 'died')
            if not os.path.exists(died):
                open(died, 'w').close()
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_real_training_is_killed(tmp_path, monkeypatch, capsys):
    """In its second epoch: the result is that of the one that was not."""
    pytest.importorskip('mmpretrain')
    (tmp_path / 'killer.py').write_text(KILLER)
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{ROOT}')
    monkeypatch.syspath_prepend(str(tmp_path))
    tool = runpy.run_path(str(ROOT / 'tools' / 'study.py'))
    variants = dict(plain=dict(config='tiny.py'))
    changes = dict(metric='mean', seeds=[0], compare=[], variants=variants)
    for name, hooks in (('killed', ", dict(type='Killer')"), ('not', '')):
        path = tmp_path / name
        path.mkdir()
        config = REAL.replace(", dict(type='Killer')", hooks)
        study = write_study(path, config, **changes)
        with pytest.raises(SystemExit) as error:
            tool['main']([str(study), '--work-dir', str(path / 'out')])
        assert error.value.code == 0, capsys.readouterr().out
    tables = [
        (tmp_path / name / 'out' / 'tiny' / 'tiny.csv').read_text().splitlines()
        for name in ('killed', 'not')
    ]
    killed, other = (dict(zip(t[0].split(','), t[1].split(','))) for t in tables)
    assert (killed['attempts'], other['attempts']) == ('2', '1')
    assert killed['final'] == other['final'] != ''
    assert killed['pruned'] == other['pruned'] != ''
