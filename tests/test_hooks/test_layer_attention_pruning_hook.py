import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS

from mmela.hooks import LayerAttentionPruningHook
from mmela.hooks.layer_attention_pruning_hook import format_speeds
from mmela.layers import AttentionState
from mmela.structure import layer_attentions
from tests.helpers.toy import toy_config, train

POLICY = dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.9)
HOOK = dict(windows=[(1, 1), (3, 3)], policy=POLICY)


def states(model):
    return {
        name: attention.attention_state
        for name, attention in layer_attentions(model).items()
    }


def pruned(model):
    return [n for n, s in states(model).items() if s != AttentionState.ACTIVE]


def report(runner):
    with open(f'{runner.work_dir}/pruning.json') as file:
        return json.load(file)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """An uninterrupted run of four epochs, pruned after 1 and 3."""
    work_dir = tmp_path_factory.mktemp('run')
    return train(toy_config(work_dir, HOOK))


def test_prunes_in_both_windows(run):
    first, second = report(run)['prunings']
    assert first['window'] == [1, 1] and second['window'] == [3, 3]
    assert first['pruned'] and second['pruned']
    # 12 samples in batches of 4
    assert first['iteration'] == 3 and second['iteration'] == 9
    assert len(first['layers']) == 8
    assert [layer['name'] for layer in second['layers']] == first['active']
    assert sorted(pruned(run.model)) == sorted(first['pruned'] + second['pruned'])


def test_report_says_why(run):
    layers = report(run)['prunings'][0]['layers']
    for layer in layers:
        is_first = layer['name'].endswith('.0.layer_attn')
        assert (layer['kl'] is None) == is_first
        assert layer['stage'] in ('layer1', 'layer2')
        assert layer['skip'] == (layer['mapped'] is not None and layer['mapped'] < 0.9)
        assert layer['reason']


def test_decision_is_that_of_the_policy_on_the_measured_kl(run):
    """The definition of EBQM by hand, on the KL values in the report."""
    for pruning in report(run)['prunings']:
        kl = [x['kl'] for x in pruning['layers'] if x['kl'] is not None]
        kl = torch.tensor(kl, dtype=torch.double)
        selected = kl[kl <= kl.quantile(0.5)]
        low, high = selected.min(), selected.max()
        x = (kl - low) / (high - low)
        cdf = 1 - (1 - x) ** 6 - 6 * x * (1 - x) ** 5
        skip = (x <= 1) & (cdf < 0.9)
        assert skip.tolist() == [
            layer['skip'] for layer in pruning['layers'] if layer['kl'] is not None
        ]


def test_kl_is_the_mean_over_the_window(tmp_path):
    """Against scores taken with other means, at a learning rate of 0."""
    from tests.test_hooks.test_kl_meter import padded_kl

    runner = train(
        toy_config(
            tmp_path, dict(windows=[(2, 3)], policy=POLICY), lr=0.0, batch_size=12
        )
    )
    (first,) = report(runner)['prunings']
    for attention in layer_attentions(runner.model).values():
        attention.attention_state = AttentionState.ACTIVE
    seen = {'layer1': [], 'layer2': []}
    for name in seen:
        getattr(runner.model, name).observer = seen[name].append
    dataset = runner.train_dataloader.dataset
    runner.model(dataset.images, dataset.targets)
    expected = []
    for scores in seen.values():
        probs = [s.double().softmax(-1).numpy() for s in scores[0]]
        expected.append(None)
        expected += [padded_kl(p, q).mean() for p, q in zip(probs, probs[1:])]
    found = [layer['kl'] for layer in first['layers']]
    assert [v is None for v in found] == [v is None for v in expected]
    found = [v for v in found if v is not None]
    expected = [v for v in expected if v is not None]
    assert found == pytest.approx(expected, rel=1e-4)


def test_nothing_is_measured_outside_the_windows(tmp_path):
    runner = train(
        toy_config(tmp_path, dict(windows=[(2, 2)], policy=POLICY), epochs=3)
    )
    assert len(report(runner)['prunings']) == 1
    assert runner.model.layer1.observer is None


def test_pruned_parameters_no_longer_change(run):
    """Neither updated nor decayed, and without a momentum."""
    after = torch.load(f'{run.work_dir}/epoch_3.pth')['state_dict']
    final = torch.load(f'{run.work_dir}/epoch_4.pth')['state_dict']
    names = pruned(run.model)
    for key in after:
        prefix = key.rsplit('.', 2)[0]
        if any(key.startswith(name + '.') for name in names):
            assert torch.equal(after[key], final[key]), key
        elif key.endswith('conv.weight'):
            assert not torch.equal(after[key], final[key]), prefix
    attentions = layer_attentions(run.model)
    for name in names:
        for param in attentions[name].parameters():
            assert param.grad is None
            assert param not in run.optim_wrapper.optimizer.state


@pytest.mark.parametrize('epoch', [1, 2, 3])
def test_resume_at_any_epoch(run, tmp_path, epoch):
    """Same decisions and the same weights as without the interruption."""
    shutil.copy(f'{run.work_dir}/epoch_{epoch}.pth', tmp_path)
    resumed = train(
        toy_config(
            tmp_path, HOOK, load_from=str(tmp_path / f'epoch_{epoch}.pth'), resume=True
        )
    )
    assert states(resumed.model) == states(run.model)
    assert report(resumed) == report(run)
    for key, value in run.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], value)


@pytest.mark.parametrize('epoch', [1, 2])
def test_resume_within_a_window(tmp_path, epoch):
    """The sums so far travel in the checkpoint."""
    hook = dict(windows=[(1, 3)], policy=POLICY)
    whole = train(toy_config(tmp_path / 'whole', hook))
    resumed = train(
        toy_config(
            tmp_path / 'resumed',
            hook,
            load_from=f'{whole.work_dir}/epoch_{epoch}.pth',
            resume=True,
        )
    )
    assert report(resumed) == report(whole)


def test_load_from_takes_the_structure_but_no_history(run, tmp_path):
    runner = train(
        toy_config(
            tmp_path,
            dict(windows=[(2, 2)], policy=dict(POLICY, mu=0.0)),
            epochs=2,
            load_from=f'{run.work_dir}/epoch_1.pth',
        )
    )
    prunings = report(run)['prunings']
    assert pruned(runner.model) == prunings[0]['pruned']
    assert [p['pruned'] for p in report(runner)['prunings']] == [[]]


def test_earlier_report_is_kept(run, tmp_path):
    path = tmp_path / 'pruning.json'
    path.write_text('{"earlier": 1}')
    train(toy_config(tmp_path, HOOK))
    assert 'prunings' in json.loads(path.read_text())
    (backup,) = tmp_path.glob('pruning_*.json')
    assert json.loads(backup.read_text()) == {'earlier': 1}


def test_scalars_reach_the_visualizer(run):
    path = f'{run._log_dir}/vis_data/scalars.json'
    with open(path) as file:
        scalars = [json.loads(line) for line in file]
    active = [s for s in scalars if 'layer_attention/active' in s]
    prunings = report(run)['prunings']
    assert [s['layer_attention/active'] for s in active] == [8] + [
        len(p['active']) for p in prunings
    ]
    assert active[0]['step'] == 0
    layer = prunings[0]['layers'][1]
    assert active[1][f'layer_attention/kl/{layer["name"]}'] == pytest.approx(
        layer['kl']
    )
    # Before, between and after the two prunings
    speeds = [s for s in scalars if 'layer_attention/step_time' in s]
    assert [s['step'] for s in speeds] == [
        *(p['iteration'] for p in prunings),
        run.iter,
    ]
    times = run.message_hub.get_scalar('train/time').data[0]
    first = prunings[0]['iteration']
    assert speeds[0]['layer_attention/step_time'] == pytest.approx(
        np.median(times[:first])
    )


@pytest.mark.parametrize('reduction', ['mean_kl', 'mean_distribution'])
def test_divergences_are_logged_during_a_window(tmp_path, reduction):
    hook = dict(HOOK, windows=[(2, 3)], reduction=reduction, log_interval=2)
    run = train(toy_config(tmp_path, hook))
    with open(f'{run._log_dir}/vis_data/scalars.json') as file:
        scalars = [json.loads(line) for line in file]
    (pruning,) = report(run)['prunings']
    layer = pruning['layers'][1]
    key = f'layer_attention/kl/{layer["name"]}'
    values = {s['step']: s[key] for s in scalars if key in s}
    # Epochs 2 and 3 of 3 iterations each
    assert list(values) == [4, 6, 8, 9]
    assert values[9] == pytest.approx(layer['kl'])
    assert len(set(values.values())) > 2
    hook['log_interval'] = -1
    with pytest.raises(ValueError, match='log_interval=-1'):
        train(toy_config(tmp_path, hook))


def test_format_speeds():
    lines = format_speeds([(8, 0.5, 100), (6, 0.4, 50)]).splitlines()
    cells = [[c.strip() for c in line.split('|')[1:-1]] for line in lines]
    assert cells[2:] == [['8', '0.5', '+0.0 %', '100'], ['6', '0.4', '-20.0 %', '50']]


def test_ema_model_has_the_same_structure_at_once(tmp_path):

    @HOOKS.register_module(force=True)
    class CheckedEMAHook(EMAHook):
        """Checks after the pruning, before the checkpoint is saved."""

        priority = 'LOW'

        def after_train_epoch(self, runner):
            assert states(self.ema_model.module) == states(self.src_model)

    cfg = toy_config(tmp_path, HOOK)
    cfg.custom_hooks.append(dict(type='CheckedEMAHook'))
    runner = train(cfg)
    assert pruned(runner.model)


def test_keep_value(tmp_path):
    """What no later attention of the stage sees goes all the same."""
    runner = train(toy_config(tmp_path, dict(HOOK, keep_value=True)))
    expected, kept = {}, False
    for name in reversed(list(states(runner.model))):
        if name.endswith('.3.layer_attn'):
            kept = False  # the last of a stage
        if name in report(runner)['prunings'][-1]['active']:
            expected[name], kept = AttentionState.ACTIVE, True
        else:
            expected[name] = (
                AttentionState.VALUE_ONLY if kept else AttentionState.PRUNED
            )
    assert states(runner.model) == expected
    assert AttentionState.VALUE_ONLY in expected.values()
    trained = runner.optim_wrapper.optimizer.state
    for name, param in runner.model.named_parameters():
        assert param.requires_grad == (param in trained), name


def test_iteration_windows(tmp_path):
    hook = dict(windows=[(2, 4)], policy=POLICY, by_epoch=False)
    runner = train(
        toy_config(
            tmp_path,
            hook,
            train_cfg=dict(by_epoch=False, max_iters=6),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3),
            ),
        )
    )
    (record,) = report(runner)['prunings']
    assert record['iteration'] == 4 and record['unit'] == 'iteration'
    saved = torch.load(tmp_path / 'iter_3.pth')['layer_attention_pruning']
    # Two iterations, the window's first and second, of 4 samples and 2 heads
    assert saved['window']['sums']['layer1'][-1] == 2 * 4 * 2


def test_kl_that_is_not_finite_is_an_error(tmp_path):

    cfg = toy_config(tmp_path, HOOK, lr=1e25)
    with pytest.raises(ValueError, match=r'layer[12]\.\d\.layer_attn'):
        train(cfg)
    assert not (tmp_path / 'pruning.json').exists()


@pytest.mark.parametrize(
    'windows, error, match',
    [
        ([(0, 1)], ValueError, r'\(0, 1\) starts before 1'),
        ([(3, 2)], ValueError, r'\(3, 2\) is reversed'),
        ([(1, 3), (3, 4)], ValueError, r'\(1, 3\) and \(3, 4\) overlap'),
        ([5], TypeError, 'window 5 is not a pair'),
        ([(1, 2, 3)], TypeError, 'not a pair'),
        ([(1, 1.5)], TypeError, 'not a pair'),
        ([(True, 1)], TypeError, 'not a pair'),
    ],
)
def test_bad_windows(windows, error, match):
    with pytest.raises(error, match=match):
        LayerAttentionPruningHook(windows=windows)


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(policy=dict(type='EBQM', gamma=0)), 'gamma'),
        (dict(policy=dict(type='EBQM', gamma=1.5)), '1.5'),
        (dict(policy=dict(type='EBQM', alpha=0)), 'alpha'),
        (dict(policy=dict(type='EBQM', alpha=-2)), '-2'),
        (dict(reduction='median'), "'median'.*'mean_kl'"),
        (dict(eps=0), 'eps=0'),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        LayerAttentionPruningHook(windows=[(1, 1)], **kwargs)


@pytest.mark.parametrize(
    'hook, kwargs, match',
    [
        (dict(windows=[(5, 5)]), {}, r'\(5, 5\) ends after the last of 4 epochs'),
        (HOOK, dict(layer_attention=None), 'prunable.*found: none'),
        (HOOK, dict(layer_attention='MRLALight'), 'prunable.*found: MRLALight'),
        (HOOK, dict(layer_attention='KCLA'), 'prunable.*found: KCLA'),
        (HOOK, dict(train_cfg=dict(by_epoch=False, max_iters=5)), 'by_epoch=False'),
        (dict(HOOK, by_epoch=False), {}, 'by_epoch=True'),
    ],
)
def test_what_does_not_fit_the_run(tmp_path, hook, kwargs, match):
    """Before the first iteration."""
    cfg = toy_config(tmp_path, hook, **kwargs)
    with pytest.raises(ValueError, match=match):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))
