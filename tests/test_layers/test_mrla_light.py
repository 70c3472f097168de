import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmela.layers import AttentionState, MRLALight, SequentialAttentionStage

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
    stage = SequentialAttentionStage(*[Block(1 + (i == 0)) for i in range(n)])
    for i in range(n):
        stage.attach(i, MRLALight(C, head_dim=D, **kwargs))
    return stage


def naive(stage, x, previous):
    """MRLA-light block by block, sample by sample and head by head."""
    last = None
    for block in stage:
        identity = x if block.downsample is None else block.downsample(x)
        x = block(x)
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


def test_errors():
    with pytest.raises(ValueError, match="previous='x' is unknown"):
        MRLALight(C, head_dim=D, previous='x')
    with pytest.raises(ValueError, match='needs the identity'):
        MRLALight(C, head_dim=D)(torch.randn(1, C, 2, 2), MRLALight.Memory())
