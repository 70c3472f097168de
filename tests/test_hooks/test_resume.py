"""Windows go on from a checkpoint saved at any time, by whomever.

With a learning rate of 0 the divergences depend on the data alone: those of a
resumed run are those of a whole one only if each batch was measured once.
"""

import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmela.hooks.saved_pruning import SavedPruning
from mmela.layers import AttentionState
from mmela.layers.state import encode
from mmela.structure import layer_attentions
from tests.helpers.runs import HOOK, POLICY, decisions, divergences, log_of, states
from tests.helpers.toy import ToyNetwork, toy_config, train

LONG = dict(windows=[(1, 3)], policy=POLICY)
STEPS = dict(windows=[(2, 5)], policy=POLICY, by_epoch=False)
BY_ITER = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))


@HOOKS.register_module()
class Saver(Hook):
    """Saves as a user's own hook does."""

    def __init__(self, name, at, when='after_train_iter', order='LOW', **kwargs):
        self.priority = order
        self.name, self.at = name, at
        self.kwargs = Config(kwargs).to_dict()
        setattr(self, when, self.save)

    def save(self, runner, *args, **kwargs):
        if runner.iter == self.at:
            runner.save_checkpoint(runner.work_dir, f'{self.name}.pth', **self.kwargs)


def still(work_dir, hook, savers=(), iterations=False, **kwargs):
    """Config of a run in which no weight changes, of 3 iterations an epoch."""
    if iterations:
        kwargs.update(
            train_cfg=dict(by_epoch=False, max_iters=7), default_hooks=BY_ITER
        )
    cfg = toy_config(work_dir, hook, lr=0.0, norm_eval=True, **kwargs)
    if iterations:
        cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    cfg.custom_hooks += [dict(type='Saver', **saver) for saver in savers]
    return cfg


def resume(cfg, path):
    return train(cfg, load_from=str(path), resume=True)


def assert_same_decisions(found, expected):
    found, expected = decisions(found), decisions(expected)
    assert [d.window for d in found] == [d.window for d in expected]
    for one, other in zip(found, expected):
        assert one.pruned == other.pruned
        assert divergences(one) == pytest.approx(divergences(other), rel=1e-9)


@pytest.mark.parametrize('hook, epoch', [(HOOK, 1), (LONG, 2)])
def test_resumed_by_the_runners_method(tmp_path, hook, epoch):
    """History and an open window, without ``resume=True`` in the config."""
    whole = train(toy_config(tmp_path / 'whole', hook))
    runner = Runner.from_cfg(toy_config(tmp_path / 'resumed', hook))
    runner.resume(f'{whole.work_dir}/epoch_{epoch}.pth')
    runner.train()
    assert states(runner.model) == states(whole.model)
    assert decisions(runner.work_dir) == decisions(whole.work_dir)


# Name, arguments of save_checkpoint and when. ``by_epoch=True``, the default,
# resumes one iteration earlier.
IN_WINDOW = [
    dict(name=f'{at}_{by_epoch}_{order}', at=at, by_epoch=by_epoch, order=order)
    for at in (1, 3, 4)
    for by_epoch in (True, False)
    for order in ('VERY_HIGH', 'LOW')
]


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('steps')
    own_count = dict(name='count', at=3, by_epoch=False, meta=dict(iter=2))
    train(still(work_dir, STEPS, [*IN_WINDOW, own_count], iterations=True))
    return work_dir


@pytest.mark.parametrize('name', [saver['name'] for saver in IN_WINDOW])
def test_users_checkpoint_in_an_iteration_window(steps, tmp_path, name):
    resume(still(tmp_path, STEPS, iterations=True), steps / f'{name}.pth')
    assert_same_decisions(tmp_path, steps)


def test_sums_of_another_point_are_dropped(steps, tmp_path):
    """As where a user gives the checkpoint a count of their own."""
    runner = resume(still(tmp_path, STEPS, iterations=True), steps / 'count.pth')
    assert 'they cover 4 iterations and the run has done 2' in log_of(runner)
    assert 'measured only from iteration 3 on' in log_of(runner)


@pytest.fixture(scope='module')
def epochs(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('epochs')
    savers = [
        dict(name=f'user_{n}', at=3 * n, when='after_train_epoch', order='VERY_HIGH')
        for n in (2, 3)
    ]
    cfg = still(work_dir, LONG, savers, default_hooks=BY_ITER)
    shown = dict(cfg.train_dataloader, sampler=dict(type='DefaultSampler'))
    best = dict(type='CheckpointHook', save_best='mean', rule='less')
    cfg.custom_hooks.append(best)
    runner = train(
        cfg, val_dataloader=shown, val_cfg={}, val_evaluator=dict(type='ToyMetric')
    )
    assert 'start of its epoch' in log_of(runner)
    (path,) = work_dir.glob('best_mean_epoch_1.pth')
    path.rename(work_dir / 'best.pth')
    return work_dir


@pytest.mark.parametrize(
    'name',
    # mmengine does the epoch of an iteration again: it is measured once all
    # the same. A user's hook may save at the end of the window, but before it
    # is decided. Validation saves the best between epochs.
    ['iter_1', 'iter_2', 'iter_5', 'iter_9', 'user_2', 'user_3', 'best'],
)
def test_window_of_epochs_goes_on(epochs, tmp_path, name):
    resume(still(tmp_path, LONG), epochs / f'{name}.pth')
    assert_same_decisions(tmp_path, epochs)


@pytest.mark.parametrize(
    'change, match',
    [
        (dict(head_dim=2), 'head_dim=4.*head_dim=2'),
        (dict(hook=dict(LONG, eps=1e-6)), 'eps=1e-08.*eps=1e-06'),
        (dict(hook=dict(LONG, reduction='mean_distribution')), 'reduction=mean_kl'),
    ],
)
def test_a_window_is_not_resumed_with_other_settings(tmp_path, change, match):
    train(toy_config(tmp_path / 'whole', LONG))
    cfg = toy_config(tmp_path / 'resumed', **dict(dict(hook=LONG), **change))
    # Another head size is refused as the network is loaded.
    with pytest.raises((ValueError, RuntimeError), match=match):
        resume(cfg, tmp_path / 'whole' / 'epoch_2.pth')
    # Outside of the window they may change.
    hook = dict(windows=[(4, 4)], policy=POLICY, eps=1e-6)
    resume(toy_config(tmp_path / 'later', hook), tmp_path / 'whole' / 'epoch_3.pth')
    assert [d.eps for d in decisions(tmp_path / 'later')] == [1e-8, 1e-6]


def test_another_policy_after_a_resume(tmp_path):
    """Each decision keeps the policy that took it."""
    train(toy_config(tmp_path / 'whole', HOOK))
    hook = dict(HOOK, policy=dict(type='FixedCount', count=1))
    resume(toy_config(tmp_path / 'resumed', hook), tmp_path / 'whole' / 'epoch_2.pth')
    first, second = decisions(tmp_path / 'resumed')
    assert first == decisions(tmp_path / 'whole')[0]
    assert first.policy['type'] == 'EBQM' and second.policy['type'] == 'FixedCount'
    assert len(second.pruned) == 1


def test_only_checkpoint_warns(tmp_path):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1))
    runner = train(toy_config(tmp_path, HOOK, default_hooks=hooks))
    assert 'max_keep_ckpts=1: mmengine deletes' in log_of(runner)


@pytest.mark.parametrize('windows, rest', [([(1, 1)], True), ([(1, 1), (4, 4)], False)])
def test_past_windows_warn(tmp_path, windows, rest):
    train(toy_config(tmp_path / 'plain'))
    hook = dict(HOOK, windows=windows)
    runner = resume(
        toy_config(tmp_path / 'resumed', hook), tmp_path / 'plain' / 'epoch_2.pth'
    )
    assert 'windows [(1, 1)] have passed without a decision' in log_of(runner)
    assert ('no window is left' in log_of(runner)) == rest


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A checkpoint amid a window, after a decision."""
    hook = dict(windows=[(1, 1), (2, 4)], policy=POLICY)
    work_dir = tmp_path_factory.mktemp('saved')
    train(toy_config(work_dir, hook))
    assert decisions(work_dir)[0].pruned
    return hook, torch.load(work_dir / 'epoch_2.pth')


def resumed_from(saved, tmp_path, change):
    """What resuming from a changed checkpoint says, without the file's name."""
    hook, checkpoint = saved
    checkpoint = copy.deepcopy(checkpoint)
    change(checkpoint['layer_attention_pruning'], checkpoint['state_dict'])
    path = tmp_path / 'changed.pth'
    torch.save(checkpoint, path)
    with pytest.raises(ValueError) as error:
        resume(toy_config(tmp_path / 'resumed', hook), path)
    start = f'{path}, layer_attention_pruning: '
    assert str(error.value).startswith(start) and '\n' not in str(error.value)
    return str(error.value)[len(start) :]


def set_state(state_dict, name, state):
    state_dict[f'{name}.state'].fill_(encode(state))


def test_decisions_that_contradict_the_network(saved, tmp_path):
    (first,) = saved[1]['layer_attention_pruning']['history']
    pruned = [layer['name'] for layer in first['layers'] if layer['pruned']]
    kept = [layer['name'] for layer in first['layers'] if not layer['pruned']]

    def revive(record, state_dict):
        for name in pruned[:2]:
            set_state(state_dict, name, AttentionState.ACTIVE)

    says = resumed_from(saved, tmp_path, revive)
    assert f'{", ".join(pruned[:2])} are active, but a decision has pruned them' in says
    assert 'Resume from another checkpoint' in says

    def prune_another(record, state_dict):
        set_state(state_dict, kept[-1], AttentionState.PRUNED)

    says = resumed_from(saved, tmp_path, prune_another)
    assert f': {kept[-1]} are pruned, but the last decision has kept them.' in says

    def rename(record, state_dict):
        record['history'][0]['layers'][0]['name'] = 'layer9.0.layer_attn'

    says = resumed_from(saved, tmp_path, rename)
    assert 'layer9.0.layer_attn are not in the network' in says


# Where in the record, what is put there, and what the message says after the field
NAN = float('nan')
WRONG_RECORDS = [
    ('history', None, 'history=None is not of type list'),
    ('history', [3], r'history\[0\]: a decision=3 is not of type dict'),
    ('history.0.layers.1.divergence', '0.1', r'history\[0\]: layers\[1\]: divergence='),
    ('history.0.layers.1.divergence', NAN, r'layers\[1\]: divergence=nan is not fin'),
    ('history.0.layers.1.pruned', 1, r'layers\[1\]: pruned=1 is not of type bool'),
    (
        'history.0.layers.2.name',
        'layer1.0.layer_attn',
        r'layers\[2\]: .* appears twice',
    ),
    ('history.0.window', [3, 1], r'history\[0\]: window=\[3, 1\] must'),
    ('history.0.window', None, r'history\[0\]: a decision has no window'),
    ('history.0.eps', 2.0, r'history\[0\]: eps=2.0 is not a number in \(0, 1\)'),
    ('history.0.iteration', -1, r'history\[0\]: iteration=-1 is not a number in \[0'),
    ('history.0.deviation', NAN, r'history\[0\]: deviation=nan is not a number in'),
    ('history.0.policy', {}, r'history\[0\]: the type of policy=None is not of type'),
    ('random_start', [], r'random_start=\[\] is not of type dict'),
    ('random_start.layer1\\.1\\.layer_attn', 'a', 'random_start: layer1.1.layer_attn='),
    ('random_start.layer1\\.1\\.layer_attn', torch.ones(3), r'shape \(3,\)'),
    ('window', 'open', "window: the window='open' is not of type dict"),
    ('window.window', [2], r'window: window=\[2\] is not a pair of integers'),
    ('window.done', 1.5, 'window: done=1.5 is not of type int'),
    ('window.put_off', -1, 'window: put_off=-1 is negative'),
    ('window.sums', None, 'window: sums=None is not of type dict'),
    ('window.sums.eps', None, 'window: sums: eps=None is not of type float'),
    ('window.sums.attentions.layer1', 4, 'window: sums: attentions: layer1=4 is not'),
    ('window.sums.sums.layer1', [1.0], 'window: sums: sums: layer1=.* of type Tensor'),
    (
        'window.sums.sums.layer1',
        -torch.ones(7).double(),
        'sums of layer1 are not float64',
    ),
]


@pytest.mark.parametrize('where, value, match', WRONG_RECORDS)
def test_damaged_records(saved, where, value, match):
    hook, checkpoint = saved
    record = copy.deepcopy(checkpoint['layer_attention_pruning'])
    *path, last = re.split(r'(?<!\\)\.', where)
    place = record
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    place[last.replace('\\', '')] = value
    network = ToyNetwork(dict(type='MRLABase', head_dim=4))
    with pytest.raises(ValueError, match=match):
        SavedPruning.read(record, hook).restore_starts(layer_attentions(network))


def test_the_damaged_file_is_named(saved, tmp_path):
    def damage(record, state_dict):
        record['history'][0]['layers'][1]['divergence'] = '0.1'

    says = resumed_from(saved, tmp_path, damage)
    assert says.startswith("history[0]: layers[1]: divergence='0.1' is not of type")
