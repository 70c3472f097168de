import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmela.layers import MLA, MRLABase
from mmela.ops import can_norm_sum, normed_sum
from mmela.ops.layer_weighted_sum import per_channel

C, G = 8, 2


def make(tokens, dtype=torch.float64, form=torch.contiguous_format):
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    norm = nn.BatchNorm2d(C)
    with torch.no_grad():
        for x in (norm.weight, norm.bias, norm.running_mean):
            x.copy_(random(C))
        norm.running_var.copy_(random(C).abs() + 0.5)
    wide = torch.promote_types(dtype, torch.float32)
    scores = random(5, G, tokens).to(wide).requires_grad_()
    values = [
        random(5, C, 4, 3).to(dtype).contiguous(memory_format=form).requires_grad_()
        for _ in range(tokens)
    ]
    grad = random(5, C, 4, 3).to(dtype).contiguous(memory_format=form)
    return norm.to(wide), scores, values, grad


def fused(norm, scores, values, relu):
    assert can_norm_sum(norm, values)
    return normed_sum(per_channel(scores.softmax(-1), values[0]), values, norm, relu)


def plain(norm, scores, values, relu):
    """Head by head, as equation 9 has it."""
    attn = scores.softmax(-1)
    size = C // G
    heads = [
        sum(
            attn[:, g, s, None, None, None] * v[:, g * size : (g + 1) * size]
            for s, v in enumerate(values)
        )
        for g in range(G)
    ]
    out = norm(torch.cat(heads, 1).to(values[0].dtype))
    return F.relu(out) if relu else out


def results(form, norm, scores, values, grad, relu):
    norm = copy.deepcopy(norm)
    out = form(norm, scores, values, relu)
    inputs = [scores, *values, norm.weight, norm.bias]
    gradients = torch.autograd.grad(out, inputs, grad)
    return [out, *gradients, *norm.buffers()]


@pytest.mark.parametrize('piece', [1, 2**19])
@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('form', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('tokens', [1, 2, 5])
def test_as_the_plain_formula(tokens, form, training, relu, piece, monkeypatch):
    module = sys.modules['mmela.ops.normed_sum']  # the function has its name
    monkeypatch.setattr(module, 'PIECE', piece)
    norm, scores, values, grad = make(tokens, form=form)
    norm.train(training)
    kept = [x.detach().clone() for x in (*values, grad)]
    found = results(fused, norm, scores, values, grad, relu)
    torch.testing.assert_close(
        found, results(plain, norm, scores, values, grad, relu), rtol=1e-9, atol=1e-10
    )
    assert found[0].is_contiguous(memory_format=form)
    torch.testing.assert_close([*values, grad], kept, rtol=0, atol=0)  # untouched


@pytest.mark.parametrize('tokens', [1, 3])
def test_half_precision_as_near_as_the_plain_formula(tokens):
    norm, scores, values, grad = make(tokens, torch.bfloat16)
    found = results(fused, norm, scores, values, grad, True)
    exact = [x.detach().double().requires_grad_() for x in (scores, *values)]
    expected = results(
        plain, copy.deepcopy(norm).double(), exact[0], exact[1:], grad.double(), True
    )
    assert found[0].dtype == found[2].dtype == torch.bfloat16
    # But for elements at which a ReLU rounds to the other side
    for x, y in zip(found, expected):
        wrong = ~torch.isclose(x.double(), y.double(), rtol=0.05, atol=0.05)
        assert wrong.double().mean() < 0.03


@pytest.mark.parametrize('training', [True, False])
def test_without_gradients(training):
    norm, scores, values, _ = make(3)
    norm.train(training)
    with torch.no_grad():
        found = fused(copy.deepcopy(norm), scores, values, True)
        expected = plain(norm, scores, values, True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('kind', [nn.BatchNorm2d, nn.SyncBatchNorm, 'no affine'])
@pytest.mark.parametrize('form', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('tokens', [1, 2, 5])
@pytest.mark.parametrize('place', ['_sum', '_sum_at_once'])
def test_in_inference_the_norm_is_part_of_the_weights(
    tokens, form, kind, relu, place, monkeypatch
):
    """Exactly but for rounding; ``_sum_at_once`` is what other devices have."""
    module = sys.modules['mmela.ops.normed_sum']
    monkeypatch.setattr(module, '_sum', getattr(module, place))
    norm, scores, values, _ = make(tokens, form=form)
    other = (
        nn.BatchNorm2d(C, affine=False)
        if kind == 'no affine'
        else kind(C, eps=1e-3, momentum=None)
    ).double()
    other.load_state_dict(norm.state_dict(), strict=kind != 'no affine')
    norm = other.eval()
    kept = [x.detach().clone() for x in values]
    assert not can_norm_sum(norm, values)  # with gradients
    with torch.no_grad():
        found = fused(norm, scores, values, relu)
        expected = plain(nn.Sequential(norm), scores, values, relu)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=form)
    torch.testing.assert_close(values, kept, rtol=0, atol=0)  # untouched
    norm.train()
    with torch.no_grad():
        assert not can_norm_sum(norm, values)


@pytest.mark.parametrize('place', ['_sum', '_sum_at_once'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_inference_in_half_precision(dtype, place, monkeypatch):
    """One rounding: as near as can be to the result in double precision."""
    module = sys.modules['mmela.ops.normed_sum']
    monkeypatch.setattr(module, '_sum', getattr(module, place))
    norm, scores, values, _ = make(3, dtype)
    with torch.no_grad():
        exact = plain(
            copy.deepcopy(norm).double().eval(),
            scores.double(),
            [v.double() for v in values],
            True,
        )
        found = fused(norm.eval(), scores, values, True)
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype), rtol=1e-2, atol=1e-4)


def test_gradient_at_zero_is_one():
    norm, scores, values, grad = make(2)
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)
    fused(norm, scores, values, True).backward(grad)
    torch.testing.assert_close(norm.bias.grad, grad.sum((0, 2, 3)))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('tokens', [1, 2])
def test_twice_differentiable(tokens, training):
    norm, scores, values, _ = make(tokens)
    norm.train(training)

    def call(scores, weight, bias, *values):
        # No ReLU, which finite differences would step over
        def run(x):
            return fused(x, scores, values, False)

        state = dict(weight=weight, bias=bias)
        return torch.func.functional_call(_Run(norm, run), _prefixed(state), ())

    inputs = (scores, norm.weight, norm.bias, *values)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


class _Run(nn.Module):
    def __init__(self, norm, run):
        super().__init__()
        self.norm, self.run = norm, run

    def forward(self):
        return self.run(self.norm)


def _prefixed(state):
    return {f'norm.{key}': value for key, value in state.items()}


def test_a_second_backward_pass():
    norm, scores, values, grad = make(3)
    out = fused(norm, scores, values, True)
    first = torch.autograd.grad(out, [scores, *values], grad, retain_graph=True)
    second = torch.autograd.grad(out, [scores, *values], grad)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_frozen_inputs():
    norm, scores, values, grad = make(3)
    expected = torch.autograd.grad(fused(norm, scores, values, True), values[1], grad)
    for x in (norm.weight, norm.bias, scores, values[0], values[2]):
        x.requires_grad_(False)
    found = torch.autograd.grad(fused(norm, scores, values, True), values[1], grad)
    torch.testing.assert_close(found, expected)


def test_what_it_does_not_take():
    norm, _, values, _ = make(2, torch.float32)
    assert can_norm_sum(norm, values)
    others = [
        None,
        nn.SyncBatchNorm(C),
        nn.GroupNorm(2, C),
        nn.BatchNorm2d(C, affine=False),
        nn.BatchNorm2d(C, momentum=None),
        nn.BatchNorm2d(C, track_running_stats=False),
        nn.BatchNorm2d(C).double(),
    ]
    assert not any(can_norm_sum(other, values) for other in others)
    assert not can_norm_sum(norm, [values[0], values[1].double()])
    assert not can_norm_sum(norm, [v.to('meta') for v in values])
    for register in ('forward', 'forward_pre', 'full_backward', 'full_backward_pre'):
        handle = getattr(norm, f'register_{register}_hook')(lambda *args: None)
        assert not can_norm_sum(norm, values)
        handle.remove()
    assert can_norm_sum(norm, values)


@pytest.mark.parametrize('attention', [MRLABase, MLA])
def test_hooks_of_the_norm_run(attention):
    layer = attention(C, head_dim=4)
    seen = []
    layer.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    layer(torch.randn(2, C, 4, 4), layer.Memory())
    assert len(seen) == 1


def test_keeps_the_values_alone():
    norm, scores, values, _ = make(3)
    kept = []

    def pack(x):
        kept.append(x)
        return x

    weights = per_channel(scores.softmax(-1), values[0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        normed_sum(weights, values, norm, True)
    maps = {x.data_ptr() for x in kept if x.shape == values[0].shape}
    assert maps == {v.data_ptr() for v in values}
