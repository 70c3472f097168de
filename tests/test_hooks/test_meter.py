import numpy as np
import pytest
import torch
from scipy.stats import entropy

from mmela.hooks import KLMeter, NetworkKLMeter
from mmela.layers import AttentionState, MRLABase
from mmela.pruning import EBQM
from mmela.structure import attention_stages
from tests.helpers.runs import padded_kl
from tests.helpers.stages import BlockStage
from tests.helpers.toy import CHANNELS, ResidualBlock, ToyNetwork


def make_stage(states=(0, 0, 0), head_dim=4):
    torch.manual_seed(0)
    stage = BlockStage(*[ResidualBlock() for _ in states])
    for index, state in enumerate(states):
        attention = MRLABase(CHANNELS, head_dim=head_dim)
        stage.attach(index, attention)
        attention.attention_state = AttentionState(state)
        torch.nn.init.normal_(attention.query.weight, std=5)
    # With BN statistics of the batch, samples would depend on one another.
    return stage.eval()


def named(stage, name='layer1'):
    """The stage as one of a network, by its name."""
    return attention_stages(torch.nn.ModuleDict({name: stage}))


def measure(stage, batches, **kwargs):
    meter, seen = KLMeter(named(stage)['layer1'], **kwargs), []
    stage.observer = lambda scores: (meter(scores), seen.append(scores))
    for batch in batches:
        stage(batch)
    # (N, G, t) per attention, over all batches
    probs = [torch.cat(s).double().softmax(-1).numpy() for s in zip(*seen)]
    return meter, probs


def values(meter):
    found = list(meter.compute().values())
    assert found[:1] == [None]
    return [divergence.total for divergence in found[1:]]


BATCHES = [torch.randn(n, CHANNELS, 5, 5) for n in (3, 1)]


@pytest.mark.parametrize('states', [(0, 0, 0), (0, 2, 0), (0, 1, 0), (0, 0, 1)])
def test_mean_kl(states):
    meter, probs = measure(make_stage(states), BATCHES)
    expected = [padded_kl(p, q).mean() for p, q in zip(probs, probs[1:])]
    assert values(meter) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('states', [(0, 0, 0), (0, 1, 0)])
def test_mean_distribution(states):
    meter, probs = measure(make_stage(states), BATCHES, reduction='mean_distribution')
    means = [p.mean((0, 1)) for p in probs]
    expected = [padded_kl(p, q) for p, q in zip(means, means[1:])]
    assert values(meter) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('states', [(0, 0, 0), (0, 1, 0)])
@pytest.mark.parametrize('reduction', ['mean_kl', 'mean_distribution'])
def test_parts(states, reduction):
    """By scipy, on the distributions; what is new has its eps as well."""
    meter, probs = measure(make_stage(states), BATCHES, reduction=reduction)
    if reduction == 'mean_distribution':
        probs = [p.mean((0, 1)) for p in probs]
    for divergence, p, q in zip(list(meter.compute().values())[1:], probs, probs[1:]):
        shared, new = np.split(q, [p.shape[-1]], axis=-1)
        eps = (1e-8 * np.log(1e-8 / new)).sum(-1)
        own = (eps - np.log(1 - new.sum(-1))).mean()
        assert divergence.shape == pytest.approx(
            entropy(p, shared, axis=-1).mean(), rel=1e-6, abs=1e-9
        )
        assert divergence.own == pytest.approx(own, rel=1e-6)
        assert divergence.shared == p.shape[-1]
        assert divergence.more == q.shape[-1] - p.shape[-1]
        assert divergence.baseline == pytest.approx(np.log(q.shape[-1] / p.shape[-1]))


def test_decision_knows_how_far_query_and_key_have_come():
    stage = make_stage()
    for attention in stage.attentions:
        start = attention.random_start
        size = len(start) // 2
        # The key stays, the query goes as far as the start is long.
        attention.key.weight.data.copy_(start[size:].view(1, 1, -1))
        step = torch.zeros(size)
        step[0] = start.norm()
        attention.query.weight.data.copy_((start[:size] + step).view(1, 1, -1))
    meter = NetworkKLMeter(named(stage))
    meter.attach()
    stage(BATCHES[0])
    decision = meter.decide(EBQM())
    assert decision.movement == pytest.approx(1)
    ratios = [
        abs(layer.divergence / layer.baseline - 1) for layer in decision.layers[1:]
    ]
    assert decision.deviation == pytest.approx(sum(ratios) / 2)


def test_every_sample_counts_the_same():
    """Uneven batches do not bias the mean."""
    stage = make_stage()
    whole, _ = measure(stage, [torch.cat(BATCHES)])
    parts, _ = measure(stage, BATCHES)
    assert values(parts) == pytest.approx(values(whole), rel=1e-5)


def test_stage_with_one_active_attention_has_no_kl():
    meter, _ = measure(make_stage((0, 2, 2)), BATCHES)
    assert values(meter) == []


def test_saturated_attention_is_finite():
    stage = make_stage()
    for attention in stage.attentions:
        torch.nn.init.normal_(attention.query.weight, std=1e5)
    meter, probs = measure(stage, BATCHES)
    assert (probs[2] == 0).any()
    assert all(0 < value < float('inf') for value in values(meter))


def test_stage_that_did_not_run_has_no_kl():
    meter = NetworkKLMeter(named(make_stage()))
    assert set(meter.compute().values()) == {None}
    assert meter.silent_stages() == ['layer1']
    decision = meter.decide(EBQM())
    assert not decision.pruned
    assert [x.reason for x in decision.layers] == [
        'kept: first of its stage, not measured',
        'kept: not measured',
        'kept: not measured',
    ]


@pytest.mark.parametrize('reduction', ['mean_kl', 'mean_distribution'])
def test_state_dict_goes_on(reduction):
    stage = make_stage()
    whole, _ = measure(stage, BATCHES, reduction=reduction)
    first, second = (NetworkKLMeter(named(stage), reduction) for _ in range(2))
    for meter, batch in zip((first, second), BATCHES):
        if meter is second:
            second.load_state_dict(first.state_dict())
        meter.attach()
        stage(batch)
        meter.detach()
    assert values(second) == pytest.approx(values(whole), rel=1e-9)
    # What version 0.1 saved
    second.load_state_dict(first.state_dict()['sums'])
    assert torch.equal(second.sums, first.sums)


@pytest.mark.parametrize('training_only', [False, True])
def test_passes_without_gradient_are_no_training(training_only):
    stage = make_stage()
    meter = NetworkKLMeter(named(stage))
    meter.attach(training_only)
    stage(BATCHES[0])
    with torch.no_grad():
        stage(BATCHES[1])
    # Samples times 2 heads
    assert meter.sums[-1] == 2 * (3 if training_only else 4)


def other_names():
    stage = make_stage()
    stage.add_module('3', stage[2])
    del stage._modules['2']
    return named(stage)


@pytest.mark.parametrize(
    'other, match',
    [
        (
            lambda: NetworkKLMeter(named(make_stage()), eps=1e-6),
            'eps=1e-08.*1e-06',
        ),
        (
            lambda: NetworkKLMeter(named(make_stage()), 'mean_distribution'),
            'reduction=mean_kl',
        ),
        (
            lambda: NetworkKLMeter(named(make_stage(), 'layer2')),
            'layer1.*layer2',
        ),
        (lambda: NetworkKLMeter(named(make_stage(head_dim=2))), 'head_dim=4'),
        # Three numbers in each case
        (lambda: NetworkKLMeter(named(make_stage((0, 0, 0, 2)))), 'pruned'),
        (lambda: NetworkKLMeter(named(make_stage((0, 1, 0, 0)))), 'value_only'),
        (lambda: NetworkKLMeter(other_names()), '3.layer_attn'),
    ],
)
def test_sums_of_other_attentions_are_refused(other, match):
    """Whatever identifies what was measured, not only how many numbers."""
    meter = NetworkKLMeter(named(make_stage()))
    with pytest.raises(ValueError, match=match):
        other().load_state_dict(meter.state_dict())


def test_over_nothing():
    """A meter that cannot measure, or has not, says so."""
    with pytest.raises(
        ValueError, match='nothing to measure: none of the 0 .*no attention'
    ):
        NetworkKLMeter({})
    network = ToyNetwork(dict(type='MRLALight', head_dim=4))
    with pytest.raises(ValueError, match='none of the 2 stages .* they have MRLALight'):
        NetworkKLMeter(attention_stages(network))
    network = ToyNetwork(dict(type='MRLABase', head_dim=4))
    meter = NetworkKLMeter(attention_stages(network))
    with pytest.warns(UserWarning, match='layer1, layer2 did not run between'):
        assert not meter.decide(EBQM()).pruned
