import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner

from mmela.hooks import DecisionLogHook, LayerAttentionPruningHook
from mmela.layers import AttentionState
from mmela.pruning import PRUNING_POLICIES, FixedCount, PruningReport
from mmela.structure import attention_stages, layer_attentions
from tests.helpers.runs import (
    HOOK,
    POLICY,
    decisions,
    divergences,
    log_of,
    padded_kl,
    pruned,
    states,
)
from tests.helpers.toy import ToyNetwork, toy_config, train


def report(runner):
    return PruningReport.read(f'{runner.work_dir}/pruning.json')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """An uninterrupted run of four epochs, pruned after 1 and 3."""
    work_dir = tmp_path_factory.mktemp('run')
    return train(toy_config(work_dir, HOOK))


def test_prunes_in_both_windows(run):
    first, second = decisions(run.work_dir)
    assert first.window == (1, 1) and second.window == (3, 3)
    assert first.pruned and second.pruned
    # 12 samples in batches of 4
    assert first.iteration == 3 and second.iteration == 9
    assert len(first.layers) == 8
    assert tuple(layer.name for layer in second.layers) == first.active
    assert sorted(pruned(run.model)) == sorted(first.pruned + second.pruned)


def test_keeps_the_unpruned_network(run, tmp_path):
    """As it is when the first window ends, without the optimizer."""
    path = f'{run.work_dir}/before_pruning.pth'
    kept = torch.load(path)
    after = torch.load(f'{run.work_dir}/epoch_1.pth')
    assert kept['meta']['iter'] == decisions(run.work_dir)[0].iteration
    assert kept['meta']['epoch'] == 1 and 'optimizer' not in kept
    for key, value in kept['state_dict'].items():
        if key.endswith('.state'):
            assert value == AttentionState.ACTIVE
        else:
            assert torch.equal(value, after['state_dict'][key])
    train(toy_config(tmp_path, dict(HOOK, keep_unpruned=False), epochs=3))
    assert decisions(tmp_path)[0].pruned
    assert not (tmp_path / 'before_pruning.pth').exists()


def test_report_says_why(run):
    for layer in decisions(run.work_dir)[0].layers:
        is_first = layer.name.endswith('.0.layer_attn')
        assert (layer.divergence is None) == is_first
        assert layer.stage in ('layer1', 'layer2')
        assert layer.pruned == (layer.mapped is not None and layer.mapped < 0.9)
        assert layer.reason


def test_decision_is_that_of_the_policy_on_the_measured_kl(run):
    """The definition of EBQM by hand, on the KL values in the report."""
    for decision in decisions(run.work_dir):
        kl = torch.tensor(divergences(decision), dtype=torch.double)
        quantile = kl.quantile(0.5)
        selected = kl[kl <= quantile]
        low, high = selected.min(), selected.max()
        x = (kl - low) / (high - low)
        cdf = 1 - (1 - x) ** 6 - 6 * x * (1 - x) ** 5
        skip = (x <= 1) & (cdf < 0.9)
        measured = [x for x in decision.layers if x.divergence is not None]
        assert skip.tolist() == [layer.pruned for layer in measured]
        for layer in measured:
            assert layer.quantile == pytest.approx(float(quantile))


def test_kl_is_the_mean_over_the_window(tmp_path):
    """Against scores taken with other means, at a learning rate of 0."""
    runner = train(
        toy_config(
            tmp_path, dict(windows=[(2, 3)], policy=POLICY), lr=0.0, batch_size=12
        )
    )
    (first,) = decisions(runner.work_dir)
    for attention in layer_attentions(runner.model).values():
        attention.attention_state = AttentionState.ACTIVE
    seen = {'layer1': [], 'layer2': []}
    for name in seen:
        attention_stages(runner.model)[name].observer = seen[name].append
    dataset = runner.train_dataloader.dataset
    runner.model(dataset.images, dataset.targets)
    expected = []
    for scores in seen.values():
        probs = [s.double().softmax(-1).numpy() for s in scores[0]]
        expected.append(None)
        expected += [padded_kl(p, q).mean() for p, q in zip(probs, probs[1:])]
    found = [layer.divergence for layer in first.layers]
    assert [v is None for v in found] == [v is None for v in expected]
    found = [v for v in found if v is not None]
    expected = [v for v in expected if v is not None]
    assert found == pytest.approx(expected, rel=1e-4)


def test_nothing_is_measured_outside_the_windows(tmp_path):
    runner = train(
        toy_config(tmp_path, dict(windows=[(2, 2)], policy=POLICY), epochs=3)
    )
    assert len(decisions(runner.work_dir)) == 1
    assert attention_stages(runner.model)['layer1'].observer is None


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
    prunings = decisions(run.work_dir)
    assert pruned(runner.model) == list(prunings[0].pruned)
    assert [p.pruned for p in decisions(runner.work_dir)] == [()]


def test_earlier_report_is_kept(run, tmp_path):
    path = tmp_path / 'pruning.json'
    path.write_text('{"earlier": 1}')
    train(toy_config(tmp_path, HOOK))
    assert decisions(tmp_path)
    (backup,) = tmp_path.glob('pruning_*.json')
    assert json.loads(backup.read_text()) == {'earlier': 1}


def test_scalars_reach_the_visualizer(run):
    path = f'{run._log_dir}/vis_data/scalars.json'
    with open(path) as file:
        scalars = [json.loads(line) for line in file]
    active = [s for s in scalars if 'layer_attention/active' in s]
    prunings = decisions(run.work_dir)
    assert [s['layer_attention/active'] for s in active] == [8] + [
        len(p.active) for p in prunings
    ]
    assert active[0]['step'] == 0
    layer = prunings[0].layers[1]
    assert active[1][f'layer_attention/kl/{layer.name}'] == pytest.approx(
        layer.divergence
    )
    # Before, between and after the two prunings
    speeds = [s for s in scalars if 'layer_attention/step_time' in s]
    assert [s['step'] for s in speeds] == [
        *(p.iteration for p in prunings),
        run.iter,
    ]
    times = run.message_hub.get_scalar('train/time').data[0]
    first = prunings[0].iteration
    assert speeds[0]['layer_attention/step_time'] == pytest.approx(
        np.median(times[:first])
    )


@pytest.mark.parametrize('reduction', ['mean_kl', 'mean_distribution'])
def test_divergences_are_logged_during_a_window(tmp_path, reduction):
    hook = dict(HOOK, windows=[(2, 3)], reduction=reduction, log_interval=2)
    run = train(toy_config(tmp_path, hook))
    with open(f'{run._log_dir}/vis_data/scalars.json') as file:
        scalars = [json.loads(line) for line in file]
    (pruning,) = decisions(run.work_dir)
    layer = pruning.layers[1]
    key = f'layer_attention/kl/{layer.name}'
    values = {s['step']: s[key] for s in scalars if key in s}
    # Epochs 2 and 3 of 3 iterations each
    assert list(values) == [4, 6, 8, 9]
    assert values[9] == pytest.approx(layer.divergence)
    assert len(set(values.values())) > 2
    hook['log_interval'] = -1
    with pytest.raises(ValueError, match='log_interval=-1'):
        train(toy_config(tmp_path, hook))


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
        if name in decisions(runner.work_dir)[-1].active:
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
    (record,) = decisions(runner.work_dir)
    assert record.iteration == 4 and record.unit == 'iteration'
    saved = torch.load(tmp_path / 'iter_3.pth')['layer_attention_pruning']
    # Two iterations, the window's first and second, of 4 samples and 2 heads
    assert saved['window']['sums']['sums']['layer1'][-1] == 2 * 4 * 2


def test_kl_that_is_not_finite_is_an_error(tmp_path):

    cfg = toy_config(tmp_path, HOOK, lr=1e25)
    with pytest.raises(ValueError, match=r'layer[12]\.\d\.layer_attn'):
        train(cfg)
    assert not (tmp_path / 'pruning.json').exists()


@MODELS.register_module()
class HalfUsedNetwork(ToyNetwork):
    """Its second stage never runs."""

    def forward(self, inputs, target, mode='tensor'):
        if mode == 'tensor':  # where attentions are attached
            return super().forward(inputs, target)
        out = self.head(self.layer1(inputs).mean((2, 3)))[:, 0]
        return dict(loss=F.mse_loss(out, target))


def test_stage_that_never_runs_is_kept(tmp_path):
    cfg = toy_config(tmp_path, HOOK)
    cfg.model.type = 'HalfUsedNetwork'
    runner = train(cfg)
    assert 'layer2 did not run during window (1, 1)' in log_of(runner)
    assert 'These layer attentions have not run in training' in log_of(runner)
    assert 'diverged' not in log_of(runner)
    assert pruned(runner.model)
    assert all(name.startswith('layer1') for name in pruned(runner.model))
    unmeasured = [x for x in decisions(tmp_path)[0].layers if x.divergence is None]
    assert [x.name for x in unmeasured] == [
        'layer1.0.layer_attn',
        *(f'layer2.{i}.layer_attn' for i in range(4)),
    ]


@PRUNING_POLICIES.register_module()
class Wordy(FixedCount):
    """Gives reasons that a terminal could take for markup."""

    def __call__(self, *args):
        return tuple(replace(x, reason='[/0.1, 0.2]') for x in super().__call__(*args))


def test_reason_with_markup(tmp_path):
    policy = dict(type='Wordy', count=1)
    runner = train(toy_config(tmp_path, dict(HOOK, policy=policy), log_level='INFO'))
    assert len(pruned(runner.model)) == 2
    assert log_of(runner).count('[/0.1, 0.2]') == 8 + 7
    assert decisions(tmp_path)[0].layers[0].reason == '[/0.1, 0.2]'


@pytest.mark.parametrize('keep', [True, False])
def test_log_says_where_files_are_and_what_to_run(tmp_path, keep):
    """And that a window begins; a checkpoint that is not kept is not named."""
    config = tmp_path / 'my_config.py'
    toy_config(tmp_path, dict(HOOK, keep_unpruned=keep), log_level='INFO').dump(config)
    runner = Runner.from_cfg(Config.fromfile(config))
    runner.train()
    text = log_of(runner)
    count = len(decisions(tmp_path))
    assert text.count('Measuring layer attentions during epoch') == count
    assert text.count(f'{tmp_path}/pruning.json') == count
    assert (f'{tmp_path}/before_pruning.pth' in text) is keep
    assert (tmp_path / 'before_pruning.pth').exists() is keep
    last = f'{tmp_path}/my_config.py {tmp_path}/epoch_4.pth'
    assert f'mmela slim {last} slim.pth' in text
    for path in last.split():
        assert os.path.isfile(path)


def test_report_is_written_before_the_log(tmp_path, monkeypatch):
    """Whatever a user's visualizer or terminal does with it."""

    def fail(self, runner, decision):
        raise RuntimeError('no terminal')

    monkeypatch.setattr(DecisionLogHook, '_log', fail)
    with pytest.raises(RuntimeError, match='no terminal'):
        train(toy_config(tmp_path, HOOK))
    assert decisions(tmp_path)[0].pruned


def test_policy_whose_config_cannot_be_kept(tmp_path):
    """Said before training, not as the first window ends."""

    @PRUNING_POLICIES.register_module(force=True)
    class Opaque(FixedCount):
        def __init__(self, **kwargs):
            super().__init__(count=1, **kwargs)
            self.secret = object()

    with pytest.raises(ValueError, match="policy.*'Opaque'.*plain values"):
        LayerAttentionPruningHook([(1, 1)], policy=dict(type='Opaque'))


@pytest.mark.parametrize(
    'windows, error, match',
    [
        ([(0, 1)], ValueError, r'\(0, 1\) starts before 1'),
        ([(3, 2)], ValueError, r'\(3, 2\) is reversed'),
        ([(1, 3), (3, 4)], ValueError, r'\(1, 3\) and \(3, 4\) overlap'),
        ([5], TypeError, r'windows=.*: 5 has type int'),
        ([(1, 2, 3)], TypeError, r'\(1, 2, 3\) has type tuple'),
        ([(1, 1.5)], TypeError, r'\(1, 1.5\) has type'),
        ([(True, 1)], TypeError, r'\(True, 1\) has type'),
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
        (dict(windows=[(5, 5)]), {}, r'\(5, 5\) ends after the 4 epochs'),
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
