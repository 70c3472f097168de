import numpy as np
import pytest
import torch
from scipy.stats import entropy

from mmela.hooks import KLMeter
from mmela.layers import AttentionState, SequentialAttentionStage
from tests.helpers.toy import CHANNELS, ResidualBlock


def make_stage(states=(0, 0, 0)):
    torch.manual_seed(0)
    stage = SequentialAttentionStage(
        *[ResidualBlock(dict(type='MRLABase', head_dim=4)) for _ in states]
    )
    for attention, state in zip(stage.attentions, states):
        attention.attention_state = AttentionState(state)
        torch.nn.init.normal_(attention.query.weight, std=5)
    # With BN statistics of the batch, samples would depend on one another.
    return stage.eval()


def measure(stage, batches, **kwargs):
    meter, seen = KLMeter(stage, **kwargs), []
    stage.observer = lambda scores: (meter(scores), seen.append(scores))
    for batch in batches:
        stage(batch)
    # (N, G, t) per attention, over all batches
    probs = [torch.cat(s).double().softmax(-1).numpy() for s in zip(*seen)]
    return meter, probs


def padded_kl(p, q, eps=1e-8):
    """ELA, eq. 8, by scipy, which normalises: undo that by hand."""
    head, rest = np.split(q, [p.shape[-1]], axis=-1)
    kl = entropy(p, head, axis=-1) - np.log(head.sum(-1))
    return kl + (eps * np.log(eps / rest)).sum(-1)


BATCHES = [torch.randn(n, CHANNELS, 5, 5) for n in (3, 1)]


@pytest.mark.parametrize('states', [(0, 0, 0), (0, 2, 0), (0, 1, 0), (0, 0, 1)])
def test_mean_kl(states):
    meter, probs = measure(make_stage(states), BATCHES)
    expected = [padded_kl(p, q).mean() for p, q in zip(probs, probs[1:])]
    assert meter.compute() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('states', [(0, 0, 0), (0, 1, 0)])
def test_mean_distribution(states):
    meter, probs = measure(make_stage(states), BATCHES, reduction='mean_distribution')
    means = [p.mean((0, 1)) for p in probs]
    expected = [padded_kl(p, q) for p, q in zip(means, means[1:])]
    assert meter.compute() == pytest.approx(expected, rel=1e-6)


def test_every_sample_counts_the_same():
    """Uneven batches do not bias the mean."""
    stage = make_stage()
    whole, _ = measure(stage, [torch.cat(BATCHES)])
    parts, _ = measure(stage, BATCHES)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-5)


def test_stage_with_one_active_attention_has_no_kl():
    meter, _ = measure(make_stage((0, 2, 2)), BATCHES)
    assert meter.compute() == []


def test_saturated_attention_is_finite():
    stage = make_stage()
    for attention in stage.attentions:
        torch.nn.init.normal_(attention.query.weight, std=1e5)
    meter, probs = measure(stage, BATCHES)
    assert (probs[2] == 0).any()
    assert all(0 < value < float('inf') for value in meter.compute())


def test_attention_without_measurement_is_nan():
    assert all(value != value for value in KLMeter(make_stage()).compute())
