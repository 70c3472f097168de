"""Measurements of layer attentions, against values computed by hand."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from mmela import LAYER_ATTENTIONS
from mmela.analysis import measure_attention
from mmela.analysis.attention import (
    BINS,
    RunningMean,
    effective_contributions,
    hook_settings,
)
from mmela.structure import prune
from tests.helpers.stages import BlockStage
from tests.helpers.toy import CHANNELS, ToyNetwork

EPS = 1e-8


class Add(nn.Module):
    """A block that adds a number to one channel."""

    def __init__(self, channel, number, attention=None):
        super().__init__()
        self.register_buffer('delta', torch.zeros(1, CHANNELS, 1, 1))
        self.delta[0, channel] = number
        if attention is not None:
            self.layer_attn = attention

    def forward(self, x):
        return x + self.delta


def attention(kind='MRLABase', **kwargs):
    """One whose query is the pooled input and whose output is its input."""
    layer = LAYER_ATTENTIONS.build(
        dict(type=kind, channels=CHANNELS, head_dim=4, zero_init=True, **kwargs)
    )
    for conv in (layer.query, layer.key):
        nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, 1] = 1.0
    return layer


class Network(nn.Module):
    """One stage of :class:`Add`, run as a model of mmengine."""

    def __init__(self, *blocks):
        super().__init__()
        self.layer1 = BlockStage(*blocks)
        for index, block in enumerate(blocks):
            if hasattr(block, 'layer_attn'):
                self.layer1.attach(index, block.layer_attn)

    def test_step(self, batch):
        return self.layer1(batch['inputs'])


def network(states='aaaa', kind='MRLABase', **kwargs):
    """Blocks by letter: with attention (a) or without (n)."""
    return Network(
        *(
            Add(i, 1.0, attention(kind, **kwargs) if s == 'a' else None)
            for i, s in enumerate(states)
        )
    )


def images(*shapes):
    torch.manual_seed(0)
    return [dict(inputs=torch.randn(shape)) for shape in shapes]


ONE = [dict(inputs=torch.eye(CHANNELS)[:1, :, None, None])]


def silent(model):
    """Attend evenly: zero queries."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.zeros_(module.weight)
    return model


def test_effective_contributions():
    lambdas = [[9.0, 9.0], [0.5, -2.0], [0.1, 3.0]]
    found = effective_contributions([torch.tensor(x) for x in lambdas])
    torch.testing.assert_close(
        found, torch.tensor([[0.05, 6.0], [0.1, 3.0], [1.0, 1.0]])
    )


def test_running_mean():
    values = torch.randn(7, 3)
    mean = RunningMean()
    for part in values.split(2):
        mean.add(part)
    np.testing.assert_allclose(mean.mean(), values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(mean.std(), values.std(0, unbiased=False), rtol=1e-5)
    constant = RunningMean()
    constant.add(torch.full((3,), 0.1))
    assert constant.std() == pytest.approx(0, abs=1e-8)


def test_even_attention():
    """Weights 1 / t, and divergences log((t + 1) / t) but for eps."""
    result = measure_attention(silent(network()), images((2, CHANNELS, 3, 3)))
    stage = result['stages']['layer1']
    assert stage['states'] == ['active'] * 4 and stage['heads'] == 2
    assert len(stage['maps']['heads']) == 2
    for rows in [stage['maps']['mean'], *stage['maps']['heads']]:
        for t, row in enumerate(rows, 1):
            assert row[:t] == pytest.approx([1 / t] * t)
            assert row[t:] == [None] * (4 - t)
    layers = result['decision']['layers']
    assert layers[0]['divergence'] is None
    for t, layer in enumerate(layers[1:], 1):
        expected = math.log((t + 1) / t) + EPS * math.log(EPS * (t + 1))
        assert layer['divergence'] == pytest.approx(expected, rel=1e-9)
    json.dumps(result)


@pytest.mark.parametrize('keep', [False, True])
def test_pruned_attention(keep):
    model = silent(network())
    prune(model, ['layer1.1.layer_attn'], keep_value=keep)
    result = measure_attention(model, images((2, CHANNELS, 3, 3)))
    stage = result['stages']['layer1']
    state = 'value_only' if keep else 'pruned'
    assert stage['states'] == ['active', state, 'active', 'active']
    maps = stage['maps']['mean']
    assert maps[1] == [None] * 4
    third = 1 / 3 if keep else 1 / 2
    assert maps[2] == [
        pytest.approx(third),
        pytest.approx(third) if keep else None,
        pytest.approx(third),
        None,
    ]
    layers = result['decision']['layers']
    assert layers[1]['divergence'] is None and '✕' in layers[1]['reason']
    # From 1 token to 3 or 2, each token new to it with eps
    new = 2 if keep else 1
    expected = math.log(new + 1) + new * EPS * math.log(EPS * (new + 1))
    assert layers[2]['divergence'] == pytest.approx(expected, rel=1e-9)
    assert [q['blocks'] for q in stage['queries'] or []] == [[0, 2], [2, 3]]


def test_weights_against_plain_code():
    """The mean over images of the softmax, image by image and head by head."""
    model = network('aaa')
    batches = images((2, CHANNELS, 3, 3), (1, CHANNELS, 5, 4))
    maps = measure_attention(model, batches)['stages']['layer1']['maps']
    expected = np.zeros((2, 3))
    for x in torch.cat([b['inputs'].mean((2, 3)) for b in batches]).numpy():
        y = x + np.tri(3, CHANNELS)  # what the three blocks put out
        for head in range(2):
            part = y[:, 4 * head : 4 * head + 4]
            score = np.exp(part @ part[2] / math.sqrt(4))
            expected[head] += score / score.sum() / 3
    np.testing.assert_allclose([h[2] for h in maps['heads']], expected, 1e-5)
    np.testing.assert_allclose(maps['mean'][2], expected.mean(0), 1e-5)


def test_similarities():
    """Features e0 + e0, then + e1, + e2 and - 5 e3: one pixel, by hand."""
    model = Network(
        Add(0, 1.0, attention()),
        Add(1, 1.0, attention()),
        Add(2, 1.0, attention()),
        Add(3, -5.0, attention()),
    )
    result = measure_attention(model, ONE)
    stage = result['stages']['layer1']
    expected = [4 / (2 * math.sqrt(5)), 5 / math.sqrt(5 * 6), 6 / math.sqrt(6 * 31)]
    assert [x['blocks'] for x in stage['features']] == [[0, 1], [1, 2], [2, 3]]
    assert [x['mean'] for x in stage['features']] == pytest.approx(expected)
    assert [x['std'] for x in stage['features']] == pytest.approx([0] * 3, abs=1e-6)
    # The first head has the same four channels, the second head none.
    assert [x['mean'] for x in stage['queries']] == pytest.approx(
        [x / 2 for x in expected]
    )
    # Not the first pair; per pair one head at 0 and one above
    counts = [0] * BINS
    for value in (0, expected[1], 0, expected[2]):
        counts[int(value * BINS)] += 1
    assert result['histogram'] == counts


def test_absolute_similarity():
    model = Network(Add(0, 1.0, attention()), Add(0, -5.0, attention()))
    stage = measure_attention(model, ONE)['stages']['layer1']
    assert stage['features'][0]['mean'] == pytest.approx(-1)
    assert stage['queries'][0]['mean'] == pytest.approx(1 / 2)


def test_batches_do_not_matter():
    model = network()
    batches = images((6, CHANNELS, 3, 3))
    parts = [dict(inputs=x) for x in batches[0]['inputs'].split([1, 3, 2])]
    whole, split = (measure_attention(model, b) for b in (batches, parts))
    assert whole['images'] == split['images'] == 6

    def numbers(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [n for v in value for n in numbers(v)]
        return [value] if isinstance(value, float) else []

    assert len(numbers(whole)) > 40
    assert numbers(split) == pytest.approx(numbers(whole), abs=1e-6)


def hooks_of(model):
    return [
        list(hooks.values())
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]


def test_nothing_is_left_behind():
    model = network()
    seen, hooks = [], hooks_of(model)
    model.layer1.observer = seen.append
    state = {k: v.clone() for k, v in model.state_dict().items()}
    measure_attention(model, ONE)
    assert model.layer1.observer == seen.append and len(seen) == 1
    assert hooks_of(model) == hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])

    def broken():
        yield ONE[0]
        raise OSError('gone')

    with pytest.raises(OSError, match='gone'):
        measure_attention(model, broken())
    assert model.layer1.observer == seen.append
    assert hooks_of(model) == hooks


@pytest.mark.parametrize('kind', ['MRLABase', 'MLA'])
def test_similarity_of_keys(kind):
    """Keys of the first head 2 e0, 2 e0 + e1, 2 e0 + e1 + e2; the second has none."""
    model = network('aaa', kind)
    model.layer1[1].layer_attn.key.weight.data *= -1
    found = measure_attention(model, ONE)['stages']['layer1']['keys']
    a, b, c = 4 / math.sqrt(20), 4 / math.sqrt(24), 5 / math.sqrt(30)
    # Of MLA, the last attention makes all keys
    sign = -1 if kind == 'MRLABase' else 1
    expected = [[1, sign * a, b], [sign * a, 1, sign * c], [b, sign * c, 1]]
    np.testing.assert_allclose(found['mean'], np.array(expected) / 2, atol=1e-6)
    np.testing.assert_allclose(found['std'], 0, atol=1e-3)
    assert found['blocks'] == [0, 1, 2]
    assert found['overall'] == pytest.approx((sign * a + b + sign * c) / 6)
    prune(model, ['layer1.1.layer_attn'])
    found = measure_attention(model, ONE)['stages']['layer1']['keys']
    assert found['blocks'] == [0, 2]
    assert found['overall'] == pytest.approx(b / 2)
    prune(model, ['layer1.2.layer_attn'])
    result = measure_attention(model, ONE)
    assert result['stages']['layer1']['keys'] is None
    assert any('similarity of keys' in note for note in result['left_out'])


def test_scores_of_kcla():
    """Keys as above, so that the weights are exp of the norms of 2 e0 and so on."""
    model = network('aaa', 'KCLA', cross_stage=False)
    result = measure_attention(model, ONE)
    assert any('norms of their keys' in note for note in result['left_out'])
    found = result['stages']['layer1']['scores']
    assert found['temperatures'] == pytest.approx([0.7, 1 / 0.7])
    weights = np.exp(0.7 * np.sqrt([4, 5, 6]))
    for t in range(3):
        shares = weights[: t + 1] / weights[: t + 1].sum()
        rest = [None] * (2 - t)
        assert found['heads'][0][t] == [*map(pytest.approx, shares), *rest]
        # The second head has keys of zeros
        assert found['heads'][1][t] == [pytest.approx(1 / (t + 1))] * (t + 1) + rest
    assert found['mean'][2][2] == pytest.approx((shares[2] + 1 / 3) / 2)
    assert found['before'] == dict(
        mean=[pytest.approx(0, abs=1e-6)] * 3,
        heads=[[pytest.approx(0, abs=1e-6)] * 3] * 2,
    )
    assert found['limited'] == [0, 0]
    prune(model, ['layer1.1.layer_attn'])
    found = measure_attention(model, ONE)['stages']['layer1']['scores']
    shares = weights[[0, 2]] / weights[[0, 2]].sum()
    assert found['heads'][0][1] == [None] * 3
    assert found['heads'][0][2] == [
        pytest.approx(shares[0]),
        None,
        pytest.approx(shares[1]),
    ]


def test_limited_scores_of_kcla():
    """A norm of 13 and one of 14.5: 0.7 of the first is below 10 alone."""
    blocks = [Add(0, d, attention('KCLA', cross_stage=False)) for d in (12.0, 1.5)]
    stage = measure_attention(Network(*blocks), ONE)['stages']['layer1']
    assert stage['scores']['limited'] == [0.5, 0]
    low, high = math.exp(0.7 * 13), math.exp(10)
    assert stage['scores']['heads'][0][1] == [
        pytest.approx(x / (low + high), rel=1e-4) for x in (low, high)
    ]


def test_scores_of_kcla_across_stages():
    """What is kept is the sum by the scores of what was seen and taken over."""
    pytest.importorskip('mmdet')
    from mmela.models.backbones.mmdet_backbones import ELAResNet

    torch.manual_seed(0)
    backbone = ELAResNet(
        depth=50,
        base_channels=4,
        stem_channels=4,
        layer_attention=dict(type='KCLA', head_dim=8, restart_blocks=[2]),
    )
    model = nn.Module()
    model.backbone = backbone
    model.data_preprocessor = lambda batch, training: batch
    stage = backbone.layer3
    seen, kept, first = [], [], []
    stage[0].layer_attn.cross_stage.register_forward_hook(
        lambda module, args, out: first.append(out[0])
    )
    stage[2].layer_attn.cross_stage.register_forward_hook(
        lambda module, args, out: kept.append(out[0])
    )

    def keep(module, args, out):
        seen.append(args[0])
        kept.append(args[1].mean)

    for block in stage:
        block.layer_attn.register_forward_hook(keep)
    batch = dict(inputs=torch.randn(1, 3, 64, 64))
    scores = measure_attention(model, [batch])['stages']['backbone.layer3']['scores']
    before = torch.tensor(scores['before']['heads'])
    assert (before > 1e-3).all() and (before < 1).all()

    def mean(row, things):
        weights = [before[:, row]]
        weights += [
            torch.tensor([h[row][s] for h in scores['heads']]) for s in range(row + 1)
        ]
        return sum(
            w.repeat_interleave(8)[:, None, None] * x[0]
            for w, x in zip(weights, things)
        )

    for row in (0, 1):
        torch.testing.assert_close(
            kept[row][0], mean(row, [*first, *seen]), rtol=1e-3, atol=1e-4
        )
    # The third restarts: it normalizes what was kept, with the same shares in it
    shares = [
        before[:, 2],
        *(torch.tensor([h[2][s] for h in scores['heads']]) for s in range(3)),
    ]
    old = [
        before[:, 1],
        *(torch.tensor([h[1][s] for h in scores['heads']]) for s in range(2)),
    ]
    for new, share in zip(shares, old):
        torch.testing.assert_close(new, share * (1 - shares[3]), rtol=1e-3, atol=1e-5)
    own = shares[3].repeat_interleave(8)[:, None, None]
    torch.testing.assert_close(
        kept[3][0], (1 - own) * kept[2][0] + own * seen[2][0], rtol=1e-3, atol=1e-4
    )


def test_no_distribution():
    model = network('aaa', 'MRLALight', previous='output')
    for index, block in enumerate(model.layer1):
        half = torch.full((4,), -2.0)
        block.layer_attn.lambda_o.data = torch.cat([half, 0 * half + 0.1 * index])
    result = measure_attention(model, ONE)
    stage = result['stages']['layer1']
    assert result['decision'] is None and stage['maps'] is None
    assert stage['features'] and stage['queries']
    found = stage['contributions']
    # Channels: 2 * 2 and 0.1 * 0.2; 2 and 0.2; 1 and 1
    assert found['blocks'] == [0, 1, 2] and found['previous'] == 'output'
    assert found['mean'] == pytest.approx([2.01, 1.1, 1])
    assert found['std'] == pytest.approx([1.99, 0.9, 0])
    notes = ' '.join(result['left_out'])
    assert 'attention maps, KL divergence and policy: MRLALight' in notes
    assert 'contributions' not in notes
    prune(model, ['layer1.1.layer_attn'])
    found = measure_attention(model, ONE)['stages']['layer1']['contributions']
    assert found['blocks'] == [0, 2]
    assert found['mean'] == pytest.approx([1.1, 1])


def test_all_pruned():
    model = network('aaa')
    prune(model, [f'layer1.{i}.layer_attn' for i in range(3)])
    result = measure_attention(model, ONE)
    stage = result['stages']['layer1']
    assert stage['maps'] is None and stage['features']
    assert all(x['divergence'] is None for x in result['decision']['layers'])
    assert any('no attention is active' in x for x in result['left_out'])


def test_blocks_without_attention():
    """As in a network that was slimmed."""
    stage = measure_attention(silent(network('nana')), ONE)['stages']['layer1']
    assert stage['states'] == ['none', 'active', 'none', 'active']
    maps = stage['maps']['mean']
    assert maps[0] == maps[2] == [None] * 4
    assert maps[3] == [None, pytest.approx(0.5), None, pytest.approx(0.5)]
    assert [x['blocks'] for x in stage['features']] == [[0, 1], [1, 2], [2, 3]]


class LoopingNetwork(Network):
    """Calls its blocks by itself, with lists of features around them."""

    def test_step(self, batch):
        outputs = [batch['inputs']]
        for block in self.layer1:
            outputs.append(block(outputs[-1]))
        return outputs[1:]


@pytest.mark.parametrize('states', ['aaaa', 'anaa', 'naan'])
def test_network_that_calls_its_blocks_by_itself(states):
    """All numbers are those of the same blocks in a Sequential."""
    found = []
    for kind in (Network, LoopingNetwork):
        torch.manual_seed(0)
        blocks = []
        for i, state in enumerate(states):
            block = Add(i, 1.0, attention() if state == 'a' else None)
            if state == 'a':  # that changes the features
                block.layer_attn.norm.weight.data.fill_(0.5)
                block.layer_attn.norm.bias.data.fill_(0.1 * i)
            blocks.append(block)
        model = kind(*blocks)
        found.append(measure_attention(model, images((2, CHANNELS, 3, 3))))
    assert found[0] == found[1]
    assert len(found[0]['stages']['layer1']['features']) == 3
    assert found[0]['stages']['layer1']['states'] == [
        dict(a='active', n='none')[s] for s in states
    ]


def test_infinite_divergence_is_said():
    model = network('aa')
    batch = [dict(inputs=torch.full((1, CHANNELS, 1, 1), math.nan))]
    result = measure_attention(model, batch)
    assert result['decision'] is None
    assert 'layer1.1.layer_attn' in result['left_out'][0]


def test_toy_model_of_two_stages():
    model = ToyNetwork(dict(type='MRLABase', head_dim=4))
    data = dict(inputs=torch.randn(3, CHANNELS, 6, 6), target=torch.zeros(3))
    result = measure_attention(model, [data], dict(type='FixedCount', count=2))
    assert list(result['stages']) == ['layer1', 'layer2']
    assert sum(x['pruned'] for x in result['decision']['layers']) == 2
    assert not model.training


def test_hook_settings():
    assert hook_settings({})['policy'] == dict(type='EBQM')
    hook = dict(
        type='LayerAttentionPruningHook',
        windows=[(1, 1)],
        policy=dict(type='Threshold', mu=0.1),
        reduction='mean_distribution',
    )
    found = hook_settings(dict(custom_hooks=[dict(type='EMAHook'), hook]))
    assert found == dict(
        policy=hook['policy'],
        reduction='mean_distribution',
        eps=1e-8,
        source='custom_hooks of the config',
    )


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(batches=[]), 'no images'),
        (dict(policy=dict(type='Nothing')), 'Nothing'),
        (dict(policy=dict(type='EBQM', mu=7)), 'mu=7'),
        (dict(reduction='median'), 'median'),
        (dict(eps=0), 'eps=0'),
        (dict(model=nn.Linear(1, 1)), 'no layer attention'),
    ],
)
def test_errors(kwargs, match):
    arguments = dict(model=network('aa'), batches=ONE)
    with pytest.raises(ValueError, match=match):
        measure_attention(**dict(arguments, **kwargs))
