import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmela.layers import AttentionState, MRLALight
from tests.helpers.stages import BlockStage

C, D = 16, 4


class Block(nn.Module):
    """A residual block whose identity can be seen from outside."""

    def __init__(self, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, stride, 1)
        self.downsample = nn.Conv2d(C, C, 1, stride) if stride > 1 else None

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv(x) + identity)


def make_stage(n=3, **kwargs):
    torch.manual_seed(0)
    stage = BlockStage(*[Block(1 + (i == 0)) for i in range(n)])
    for i in range(n):
        stage.attach(i, MRLALight(C, head_dim=D, **kwargs))
    return stage


def naive(stage, x, previous):
    """MRLA-light block by block, sample by sample and head by head."""
    last = None
    for block in stage:
        identity = x if block.downsample is None else block.downsample(x)
        x = block.forward(x)  # without its hooks
        attention = block.layer_attn
        if not attention.active:
            continue
        out = attention.value(x).clone()
        for b in range(len(x)):
            y = x[b].mean((1, 2))[None, None]
            q = F.conv1d(y, attention.query.weight, padding='same')[0, 0]
            k = F.conv1d(y, attention.key.weight, padding='same')[0, 0]
            for g in range(C // D):
                head = slice(g * D, (g + 1) * D)
                gate = torch.sigmoid(q[head].dot(k[head]) / math.sqrt(D))
                out[b, head] = out[b, head] * gate
        before = identity if previous == 'identity' else last
        if before is not None:
            out = out + attention.lambda_o[:, None, None] * before
        last = out
        norm = attention.norm
        if norm is not None:
            out = F.batch_norm(out, None, None, norm.weight, norm.bias, True)
        x = x + out
    return x


@pytest.mark.parametrize('previous', ['identity', 'output'])
@pytest.mark.parametrize('pruned', [(), (1,), (0,)])
def test_equals_naive_loops(previous, pruned):
    stage = make_stage(4, previous=previous)
    for attention in stage.attentions:
        nn.init.normal_(attention.query.weight, std=5)
    for index in pruned:
        stage[index].layer_attn.attention_state = AttentionState.PRUNED
    x = torch.randn(2, C, 7, 6)
    torch.testing.assert_close(stage(x), naive(stage, x, previous))


@pytest.mark.parametrize('previous', ['identity', 'output'])
def test_every_parameter_gets_a_gradient(previous):
    stage = make_stage(previous=previous)
    stage(torch.randn(2, C, 8, 8)).square().sum().backward()
    for name, param in stage.named_parameters():
        assert param.grad is not None, name
        if not (previous == 'output' and name == '0.layer_attn.lambda_o'):
            assert param.grad.abs().sum() > 0, name


def test_downsample_runs_once():
    stage = make_stage()
    calls = []
    stage[0].downsample.register_forward_hook(lambda *a: calls.append(1))
    stage(torch.randn(2, C, 8, 8))
    assert len(calls) == 1


def test_without_norm_what_is_remembered_stays_as_it_is():
    """The output of an attention is the memory of the next one."""
    torch.manual_seed(0)
    stage = make_stage(4, previous='output', norm_cfg=None)
    x = torch.randn(2, C, 8, 8)
    seen = []
    for attention in stage.attentions:
        attention.register_forward_hook(
            lambda m, args, out: seen.append((out, out.clone()))
        )
    torch.testing.assert_close(stage(x), naive(stage, x, 'output'))
    assert len(seen) == 4
    assert all(torch.equal(out, copy) for out, copy in seen)


def test_lambda_is_drawn_from_a_standard_normal():
    torch.manual_seed(0)
    attention = MRLALight(2048)
    for _ in range(2):
        assert abs(attention.lambda_o.mean()) < 0.1
        assert abs(attention.lambda_o.std() - 1) < 0.1
        nn.init.constant_(attention.lambda_o, 7)
        attention.init_weights()


def test_no_distribution_and_no_value_to_keep():
    attention = MRLALight(C, head_dim=D)
    assert not attention.prunable
    attention.attention_state = AttentionState.VALUE_ONLY
    with pytest.raises(NotImplementedError, match='MRLALight has no key'):
        attention.store(torch.randn(1, C, 2, 2), MRLALight.Memory())


@pytest.mark.parametrize(
    'ablation',
    [
        dict(previous='none'),
        dict(learn_lambda=False),
        dict(learn_lambda=False, previous='output'),
        dict(value_conv=False),
        dict(fc_reduction=2),
        dict(gate=False, previous='none'),
    ],
    ids=str,
)
def test_ablations(ablation):
    """Table 4, b to e and g: what is left out is left out, the rest is as it was."""
    stage = make_stage(3, **ablation)
    x = torch.randn(2, C, 8, 8)
    expected, last = x, None
    for block in stage:
        identity = expected
        if block.downsample is not None:
            identity = block.downsample(expected)
        expected = block.forward(expected)
        attention = block.layer_attn
        out = expected
        if ablation.get('value_conv', True):
            weight = attention.value.weight
            out = F.conv2d(expected, weight, padding=1, groups=C)
        if ablation.get('gate', True):
            y = expected.mean((2, 3))
            if 'fc_reduction' in ablation:
                q, k = y @ attention.query.weight.T, y @ attention.key.weight.T
            else:
                q, k = (
                    F.conv1d(y[:, None], f.weight, padding='same')[:, 0]
                    for f in (attention.query, attention.key)
                )
            d = D // ablation.get('fc_reduction', 1)
            gates = [
                torch.sigmoid((q * k)[:, g * d : (g + 1) * d].sum(1) / math.sqrt(d))
                for g in range(C // D)
            ]
            gates = torch.stack(gates, 1).repeat_interleave(D, 1)
            out = out * gates[..., None, None]
        previous = ablation.get('previous', 'identity')
        before = dict(identity=identity, output=last, none=None)[previous]
        if before is not None:
            scale = 1.0
            if ablation.get('learn_lambda', True):
                scale = attention.lambda_o[:, None, None]
            out = out + scale * before
        last = out
        norm = attention.norm
        out = F.batch_norm(out, None, None, norm.weight, norm.bias, True)
        expected = expected + out
    torch.testing.assert_close(stage(x), expected)
    stage(x).square().sum().backward()
    assert all(p.grad is not None for p in stage.parameters())
    for attention in stage.attentions:
        attention.init_weights()
        moved = attention.movement()
        assert moved is None if not ablation.get('gate', True) else moved == 0
    for name in ('lambda_o', 'query', 'key'):
        gone = dict(
            lambda_o=not ablation.get('learn_lambda', True)
            or ablation.get('previous') == 'none',
        ).get(name, not ablation.get('gate', True))
        assert hasattr(stage[0].layer_attn, name) != gone


def test_checkpoints_of_the_full_attention_are_as_before():
    assert MRLALight(C, D).fingerprint() == 'MRLALight(head_dim=4, previous=identity)'
    without = MRLALight(C, D, learn_lambda=False).fingerprint()
    assert 'learn_lambda=False' in without


def test_errors():
    with pytest.raises(ValueError, match='fc_reduction=3 does not divide head_dim=4'):
        MRLALight(C, head_dim=D, fc_reduction=3)
    with pytest.raises(ValueError, match="previous='x' is unknown"):
        MRLALight(C, head_dim=D, previous='x')
    with pytest.raises(ValueError, match='finds no identity input'):
        MRLALight(C, head_dim=D)(torch.randn(1, C, 2, 2), MRLALight.Memory())
