import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmela.layers import MLA, AttentionState
from tests.helpers.stages import BlockStage, run_one

C, D = 16, 4


def naive(attentions, xs):
    """MLA block by block, sample by sample and head by head."""
    outs = []
    for t, (attention, x_t) in enumerate(zip(attentions, xs)):
        if not attention.active:
            outs.append(x_t)
            continue
        visible = [
            s
            for s in range(t + 1)
            if attentions[s].attention_state != AttentionState.PRUNED
        ]
        values = [attention.value(xs[s]) for s in visible]
        o = torch.zeros_like(x_t)
        for b in range(len(x_t)):
            pooled = [xs[s][b].mean((1, 2))[None, None] for s in visible]
            q = F.conv1d(
                x_t[b].mean((1, 2))[None, None], attention.query.weight, padding='same'
            )[0, 0]
            keys = [
                F.conv1d(y, attention.key.weight, padding='same')[0, 0] for y in pooled
            ]
            for g in range(C // D):
                head = slice(g * D, (g + 1) * D)
                logits = [q[head].dot(k[head]) / math.sqrt(D) for k in keys]
                weights = torch.stack(logits).softmax(0)
                o[b, head] = sum(w * v[b, head] for w, v in zip(weights, values))
        norm = attention.norm
        o = F.batch_norm(o, None, None, norm.weight, norm.bias, True)
        outs.append(x_t + F.relu(o))
    return outs


def test_equals_naive_loops():
    for states in ((0, 0, 0, 0), (0, 2, 0, 0), (0, 1, 0, 2)):
        torch.manual_seed(0)
        attentions = [MLA(C, head_dim=D) for _ in range(4)]
        for attention, state in zip(attentions, states):
            nn.init.normal_(attention.query.weight, std=5)
            attention.attention_state = AttentionState(state)
        xs = [torch.randn(2, C, 6, 5) for _ in range(4)]
        memory = MLA.Memory()
        outs = [run_one(a, x, memory) for a, x in zip(attentions, xs)]
        for out, expected in zip(outs, naive(attentions, xs)):
            torch.testing.assert_close(out, expected)


def test_prunable_and_keeps_no_parameter_for_later_ones():
    attention = MLA(C, head_dim=D)
    assert attention.prunable
    attention.attention_state = AttentionState.VALUE_ONLY
    assert not any(p.requires_grad for p in attention.parameters())


def test_replace():
    """BN(O) in place of the output, and nothing that speaks of a sum."""
    stage = BlockStage(torch.nn.Identity())
    attention = MLA(16, head_dim=8, replace=True)
    stage.attach(0, attention)
    stage.eval()
    x = torch.randn(2, 16, 5, 5)
    # Over one block the softmax is 1, so that O is the value
    expected = attention.norm(attention.value(x))
    torch.testing.assert_close(stage(x), expected)
    assert (expected < 0).any()
    assert attention.fingerprint() == 'MLA(head_dim=8, relu=False, replace=True)'
    for name in ('drop_path', 'zero_init', 'relu'):
        with pytest.raises(
            ValueError, match=f'{name}=.*replace=True, which adds nothing'
        ):
            MLA(16, head_dim=8, replace=True, **{name: 0.5 if '_p' in name else True})


def test_mixed_heads():
    """As the authors' eq. 4: (B, t, C) viewed as (B, G, t, d), blocks not moved.

    Element by element, which by the equation it is not.
    """
    attentions = [MLA(C, head_dim=D, replace=True, mixed_heads=True) for _ in range(3)]
    assert not attentions[0].prunable
    assert attentions[0].fingerprint().endswith('replace=True, mixed_heads=True)')
    memory = MLA.Memory()
    xs = [torch.randn(2, C, 3, 4) for _ in attentions]
    groups = C // D
    for t, (attention, x) in enumerate(zip(attentions, xs), 1):
        attention.eval()
        found = attention(x, memory)
        pooled = [y.mean((2, 3)) for y in xs[:t]]
        query = attention.query(pooled[-1][:, None])[:, 0]
        keys = torch.cat([attention.key(y[:, None])[:, 0] for y in pooled], 1)
        values = torch.cat([attention.value(y) for y in xs[:t]], 1)
        out = torch.zeros_like(x)
        for g in range(groups):
            tokens = [slice((g * t + j) * D, (g * t + j + 1) * D) for j in range(t)]
            q = query[:, g * D : (g + 1) * D]
            scores = [(q * keys[:, token]).sum(1) / D**0.5 for token in tokens]
            weights = torch.stack(scores).softmax(0)
            for weight, token in zip(weights, tokens):
                out[:, g * D : (g + 1) * D] += (
                    weight[:, None, None, None] * values[:, token]
                )
        torch.testing.assert_close(found, attention.norm(out))
    plain = MLA(C, head_dim=D, replace=True).eval()
    plain.load_state_dict(
        {k: v for k, v in attention.state_dict().items() if 'signature' not in k}
    )
    pooled = [y.mean((2, 3))[:, None] for y in xs[:2]]
    memory = MLA.Memory(inputs=xs[:2], pooled=pooled)
    assert (plain(xs[2], memory) - found).abs().max() > 1e-2
