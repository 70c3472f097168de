"""Linearised layer attentions against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmela.layers import LinearizedMLA
from mmela.layers.linearized import KINDS
from tests.helpers.stages import run_one

C, D, BLOCKS = 16, 4, 5


def conv(module, x):
    return F.conv1d(x[None, None], module.weight, padding='same')[0, 0]


def focused(x, a):
    """Of all channels of one block."""
    x = (x.clamp(min=0) + 1e-6) / a
    return x**2 * x.norm() / (x**2).norm()


def fourier(x, attention, head):
    x = attention.projection[head].T @ x
    return torch.cat([x.sin(), x.cos()]) / math.sqrt(8)


def naive(kind, attention, xs, b):
    """What one attention retrieves for sample ``b`` from the blocks ``xs``."""
    if kind == 'focused':
        xs = [x + attention.position for x in xs]
    pooled = [x[b].mean((1, 2)) for x in xs]
    q = conv(attention.query, pooled[-1])
    ks = [conv(attention.key, y) for y in pooled]
    values = [attention.value(x)[b] for x in xs]
    if kind == 'focused':
        a = F.softplus(attention.spread).flatten()
        q, ks = focused(q, a), [focused(k, a) for k in ks]
    if kind == 'linear':
        q, ks = F.elu(q) + 1, [F.elu(k) + 1 for k in ks]
    out = torch.zeros_like(values[0])
    if kind == 'hydra':
        for k, v in zip(ks, values):
            out += (q / q.norm() * k / k.norm())[:, None, None] * v
        return out
    for g in range(C // D):
        head = slice(g * D, (g + 1) * D)
        qh, kh = q[head], [k[head] for k in ks]
        if kind == 'performer':
            qh = fourier(qh, attention, g)
            kh = [fourier(k, attention, g) for k in kh]
        if kind == 'linformer':
            vh = [v[head] for v in values]
            if len(xs) > 3:
                mixtures = attention.mix_keys.weight, attention.mix_values.weight
                kh, vh = (
                    [sum(w * x for w, x in zip(row, things)) for row in mixture]
                    for mixture, things in zip(mixtures, (kh, vh))
                )
            logits = torch.stack([qh.dot(k) for k in kh]) / math.sqrt(D)
            out[head] = sum(w * v for w, v in zip(logits.softmax(0), vh))
        else:
            out[head] = sum(qh.dot(k) * v[head] for k, v in zip(kh, values))
    return out


@pytest.mark.parametrize('kind', KINDS)
def test_equals_plain_loops(kind):
    torch.manual_seed(0)
    attentions = [
        LinearizedMLA(C, head_dim=D, kind=kind, block=i, norm_cfg=None)
        for i in range(BLOCKS)
    ]
    for attention in attentions:
        nn.init.normal_(attention.query.weight, std=5)
        for name in ('position', 'spread'):
            if hasattr(attention, name):
                nn.init.normal_(getattr(attention, name))
    xs = [torch.randn(2, C, 6, 5) for _ in range(BLOCKS)]
    if kind == 'focused':  # each block adds a position of its own
        for attention in attentions[1:]:
            attention.position = attentions[0].position
    memory = LinearizedMLA.Memory()
    outs = [run_one(a, x, memory) for a, x in zip(attentions, xs)]
    for t, (attention, out) in enumerate(zip(attentions, outs)):
        found = torch.stack([naive(kind, attention, xs[: t + 1], b) for b in range(2)])
        assert found.std() > 1e-3
        torch.testing.assert_close(out, xs[t] + found, rtol=1e-4, atol=1e-5)
    assert not memory.scores and not attentions[0].prunable


@pytest.mark.parametrize('kind', ['linear', 'focused', 'hydra', 'performer'])
@pytest.mark.parametrize('training', [False, True])
def test_weight_of_a_single_block(kind, training):
    """It is no softmax, so it is not 1, and it learns; with a normalization too."""
    attention = LinearizedMLA(C, head_dim=D, kind=kind, relu=False).train(training)
    x = torch.randn(2, C, 6, 5)
    with torch.set_grad_enabled(training):
        found = attention(x, LinearizedMLA.Memory())
        bare = torch.stack([naive(kind, attention, [x], b) for b in range(2)])
        torch.testing.assert_close(found, attention.norm(bare), rtol=1e-4, atol=1e-5)
    if training:
        found.square().sum().backward()
        assert attention.query.weight.grad.abs().max() > 0


def test_linear_by_hand():
    """Even pixels, so that the query is elu(2) + 1 = 3 in each of two channels."""
    attention = LinearizedMLA(2, head_dim=2, norm_cfg=None, value_conv=False)
    for module in (attention.query, attention.key):
        nn.init.ones_(module.weight)
    size = attention.key.weight.shape[-1]
    assert size == 1
    memory = LinearizedMLA.Memory()
    first, second = torch.full((1, 2, 1, 1), -1.0), torch.full((1, 2, 1, 1), 2.0)
    attention(first, memory)
    out = attention(second, memory)
    # Weights 2 * 3 * exp(-1) of the value -1, and 2 * 3 * 3 of the value 2
    torch.testing.assert_close(out, torch.full_like(out, 36 - 6 * math.exp(-1)))


@pytest.mark.parametrize('kind', KINDS)
def test_trains_and_keeps_its_projection(kind):
    make = lambda: LinearizedMLA(C, head_dim=D, kind=kind, block=3)  # noqa: E731
    attention, other = make(), make()
    memory = LinearizedMLA.Memory()
    for _ in range(4):
        out = attention(torch.randn(2, C, 4, 4), memory)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in attention.parameters())
    other.load_state_dict(attention.state_dict())
    if kind == 'performer':
        assert torch.equal(other.projection, attention.projection)
    assert f'kind={kind}' in attention.fingerprint()
    wrong = LinearizedMLA(C, head_dim=D, kind='linear' if kind == 'hydra' else 'hydra')
    with pytest.raises(RuntimeError, match='kind='):
        wrong.load_state_dict(attention.state_dict(), strict=False)


def test_unknown():
    with pytest.raises(ValueError, match='quadratic.*linformer'):
        LinearizedMLA(C, head_dim=D, kind='quadratic')


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_backends_agree(kind, training):
    """With a norm, also in the first block, whose one weight is not always 1."""
    outs = []
    for backend in ('auto', 'reference'):
        torch.manual_seed(0)
        memory = LinearizedMLA.Memory()
        outs.append([])
        for block in range(4):
            attention = LinearizedMLA(
                C, head_dim=D, kind=kind, block=block, backend=backend
            ).train(training)
            with torch.no_grad():
                outs[-1].append(attention(torch.randn(3, C, 4, 4), memory))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
