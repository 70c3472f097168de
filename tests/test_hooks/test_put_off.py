"""Decisions wait until the attentions have learned."""

import pytest
import torch

from tests.helpers.runs import POLICY, decisions, log_of, pruned
from tests.helpers.toy import toy_config, train


def config(work_dir, learn=False, until=None, windows=((1, 1),), **kwargs):
    """A run of four epochs in which query and key learn fast or not at all."""
    hook = dict(windows=list(windows), policy=POLICY, put_off_until=until)
    lr = 0.01 if learn else 0.0
    kwargs.setdefault('log_level', 'INFO')
    cfg = toy_config(work_dir, hook, **kwargs)
    cfg.optim_wrapper = dict(
        optimizer=dict(type='Adam', lr=lr),
        paramwise_cfg=dict(
            custom_keys={name: dict(lr_mult=100) for name in ('query', 'key')}
        ),
    )
    return cfg


def test_attention_that_has_learned_is_judged_at_once(tmp_path):
    runner = train(config(tmp_path, learn=True, until=4))
    (decision,) = decisions(tmp_path)
    assert decision.learned and decision.warning is None
    assert decision.window == decision.planned == (1, 1)
    assert decision.deviation > 0.25 and decision.movement > 0.4
    assert 'not learned' not in log_of(runner)


def test_decision_without_a_signal_warns(tmp_path):
    runner = train(config(tmp_path))
    (decision,) = decisions(tmp_path)
    assert decision.learned is False and decision.movement == 0
    assert decision.pruned == tuple(pruned(runner.model)) != ()
    assert log_of(runner).count('has not learned yet') == 1
    (layer,) = [x for x in decision.layers if x.name == 'layer1.1.layer_attn']
    assert layer.baseline == pytest.approx(0.693147, abs=1e-6)
    assert layer.shape == pytest.approx(0, abs=1e-9)


def test_put_off_to_the_last_epoch(tmp_path):
    runner = train(config(tmp_path, until=3))
    (decision,) = decisions(tmp_path)
    assert (decision.window, decision.planned) == ((3, 3), (1, 1))
    assert decision.put_off == 2 and decision.iteration == 9
    assert decision.pruned
    text = log_of(runner)
    assert 'Window (1, 1) is put off to (2, 2)' in text
    assert 'Window (2, 2) is put off to (3, 3)' in text
    # The last epoch alone was measured: 12 samples
    assert text.count('has not learned yet') == 3


def test_put_off_by_the_length_of_a_window(tmp_path):
    cfg = config(tmp_path, windows=[(1, 2)], until=4)
    train(cfg)
    (decision,) = decisions(tmp_path)
    assert (decision.window, decision.put_off) == ((3, 4), 2)


def test_put_off_until_it_has_learned(tmp_path):
    """Learns from epoch 3 on."""
    cfg = config(tmp_path, learn=True, until=4)
    cfg.param_scheduler = [
        dict(type='ConstantLR', factor=1e-9, begin=0, end=3, by_epoch=True)
    ]
    train(cfg)
    (decision,) = decisions(tmp_path)
    assert decision.window == (3, 3) and decision.learned


def test_window_gives_way_to_the_next(tmp_path):
    runner = train(config(tmp_path, windows=[(1, 1), (3, 3)], until=4))
    (decision,) = decisions(tmp_path)
    assert (decision.window, decision.planned) == ((4, 4), (3, 3))
    assert 'Window (2, 2) is dropped in favour of window (3, 3)' in log_of(runner)


@pytest.mark.parametrize('epoch', [1, 2, 3])
def test_resume_while_put_off(tmp_path, epoch):
    cfg = config(tmp_path / 'whole', until=4)
    train(cfg)
    (expected,) = decisions(tmp_path / 'whole')
    assert expected.window == (4, 4)
    # Drawn otherwise: the start that counts is that of the first run.
    cfg = config(tmp_path / 'resumed', until=4, randomness=dict(seed=1))
    path = tmp_path / 'whole' / f'epoch_{epoch}.pth'
    runner = train(cfg, load_from=str(path), resume=True)
    (decision,) = decisions(tmp_path / 'resumed')
    assert decision.movement == 0
    assert decision.window == (4, 4) and decision.pruned == expected.pruned
    found = [layer.divergence for layer in decision.layers if layer.shape is not None]
    assert found == pytest.approx(
        [x.divergence for x in expected.layers if x.shape is not None], rel=1e-6
    )
    assert 'without a decision' not in log_of(runner)


def test_loaded_attention_has_learned_before(tmp_path):
    """Weights of a checkpoint are no random start."""
    trained = train(config(tmp_path / 'first', learn=True))
    path = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=trained.model.state_dict()), path)
    cfg = config(tmp_path / 'second', until=4, load_from=str(path))
    cfg.randomness = dict(seed=1)
    train(cfg)
    (decision,) = decisions(tmp_path / 'second')
    assert decision.window == (1, 1) and decision.movement > 0.4


def test_sums_of_an_earlier_version_are_dropped(tmp_path):
    """They were of divergences, not of their parts; the run goes on."""
    train(config(tmp_path / 'whole', windows=[(1, 3)]))
    path = tmp_path / 'whole' / 'epoch_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint['layer_attention_pruning']['window']['put_off']
    del checkpoint['layer_attention_pruning']['random_start']
    torch.save(checkpoint, path)
    cfg = config(tmp_path / 'resumed', windows=[(1, 3)])
    runner = train(cfg, load_from=str(path), resume=True)
    assert 'or an earlier version of mmela saved them' in log_of(runner)
    assert 'measured only from epoch 2 on' in log_of(runner)
    (decision,) = decisions(tmp_path / 'resumed')
    assert decision.window == (1, 3)


@pytest.mark.parametrize('until', [1, 0, 2.5, '3', True])
def test_values_that_put_nothing_off_are_refused(tmp_path, until):
    with pytest.raises((TypeError, ValueError), match=f'put_off_until={until!r} '):
        train(config(tmp_path, until=until))


def test_value_after_the_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match='put_off_until=9 exceeds the 4'):
        train(config(tmp_path, until=9))
