"""Pieces give what plain code gives: values, gradients, and gradients of gradients."""

import copy
import importlib

import pytest
import torch
from torch import nn

from mmela.layers import AttnRes
from mmela.ops import depth_mixture
from mmela.ops.depth_mixture import added_since
from tests.helpers.stages import BlockStage

module = importlib.import_module('mmela.ops.depth_mixture')
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(params=[7, 60, 2**18], autouse=True)
def piece(request, monkeypatch):
    """Elements of a piece: a few positions, a few samples, all."""
    monkeypatch.setattr(module, 'PIECE', request.param)


def arguments(count=3, heads=2, more=False, layout=LAYOUTS[0], dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = size = (3, 4, 2, 3)

    def draw(*shape, dtype=torch.double):
        return torch.randn(shape, generator=generator, dtype=torch.double).to(dtype)

    def draw_map():
        return draw(*size, dtype=dtype).contiguous(memory_format=layout)

    wide = torch.promote_types(dtype, torch.float)
    x, *values = (draw_map() for _ in range(count + 1 + more))
    contained = draw(count, batch, heads, height, width, dtype=wide)
    norms = draw(count, batch, 1, height, width, dtype=wide).abs() + 0.5
    query = draw(channels, dtype=wide)
    args = [x, contained, query, norms, *values]
    return [arg.requires_grad_() for arg in args]


def mixture(x, contained, query, norms, *values, backend='auto', chained=False):
    found = depth_mixture(
        x, contained, query, norms, values, 3.0, backend, chained=chained
    )
    return (*found[:3], *found[3])


def results(args, **kwargs):
    """Output, scores, weights, and gradients of all that has one."""
    out, scores, weights, *tokens = mixture(*args, **kwargs)
    loss = out.float().sin().sum() + weights.square().sum()
    # As if later mixtures had the tokens too
    loss = loss + sum((i + 2) * t.float().cos().sum() for i, t in enumerate(tokens))
    return [out, scores, weights, *torch.autograd.grad(loss, args)]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('more', [False, True])
@pytest.mark.parametrize('heads', [1, 2])
def test_as_plain_code(heads, more, layout):
    args = arguments(heads=heads, more=more, layout=layout)
    expected = results(args, backend='reference')
    ways = [False] if more else [False, True]
    for chained in ways:
        for one, other in zip(results(args, chained=chained), expected):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_half_precision(layout):
    """Sums are in single precision, also with autocast."""
    args = arguments(layout=layout, dtype=torch.bfloat16)
    expected = results(args, backend='reference')
    assert [e.dtype for e in expected[:3]] == [torch.bfloat16, *[torch.float] * 2]
    with torch.autocast('cpu', torch.bfloat16):
        found = results(args, chained=True)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_mixed_layouts():
    args = arguments()
    expected = results(args, backend='reference')
    for index in (0, 5):
        mixed = list(args)
        mixed[index] = (
            args[index].detach().contiguous(memory_format=torch.channels_last)
        ).requires_grad_()
        for one, other in zip(results(mixed, chained=True), expected):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('chained', [False, True])
def test_what_needs_no_gradient(chained):
    args = arguments()
    for index in (0, 4, 6):
        args[index] = args[index].detach()
    asked = [arg for arg in args if arg.requires_grad]
    grads = []
    for backend in ('auto', 'reference'):
        out, _, weights, *tokens = mixture(*args, backend=backend, chained=chained)
        assert [t.requires_grad for t in tokens] == [False, True, False]
        loss = out.square().sum() + weights.square().sum() + tokens[1].sum()
        grads.append(torch.autograd.grad(loss, asked))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('more', [False, True])
def test_second_gradients(more):
    args = arguments(count=2, more=more)

    def function(*args):
        out, _, weights, *tokens = mixture(*args, chained=not more)
        return (out, weights, *tokens)

    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('two', [False, True])
def test_what_was_added(two, layout):
    x, before = (arg.detach() for arg in arguments(layout=layout)[4:6])
    args = [arg.requires_grad_() for arg in ((x, before) if two else (x,))]

    def function(x, before=None, backend='auto'):
        return added_since(x, before, backend)

    for one, other in zip(function(*args), function(*args, backend='reference')):
        torch.testing.assert_close(one, other)
    assert function(*args)[0].data_ptr() != x.data_ptr()
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)


def test_gradients_of_a_token_close_to_zero_in_half_precision():
    """Its norm to the power of 3 is beyond half precision."""
    x = torch.full((1, 4, 2, 2), 1e-5, dtype=torch.half, requires_grad=True)
    grads = []
    for backend in ('auto', 'reference'):
        added, norms = added_since(x, None, backend)
        loss = (added * norms).sum()  # RMSNorm
        grads.append(torch.autograd.grad(loss, x)[0])
    assert grads[0].isfinite().all() and grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_data_type_is_that_of_the_map(backend):
    """Also if the first token is in half precision, as with autocast."""
    x, contained, query, norms, *values = (a.detach() for a in arguments())
    x, *single = (a.float() for a in (x, contained, query, norms))
    values[0] = values[0].bfloat16()
    out, *_ = mixture(x, *single, *values, backend=backend)
    assert out.dtype == torch.float


@pytest.mark.parametrize('twice', [False, True])
def test_a_stage_keeps_no_gradient_of_an_earlier_pass(twice):
    """What mixtures add to in place is of one backward pass."""
    torch.manual_seed(0)
    stage = BlockStage(*[nn.Conv2d(4, 4, 1) for _ in range(4)])
    for index in range(4):
        stage.attach(index, AttnRes(4, total='sum', block=index))
        if index:
            nn.init.normal_(stage[index].layer_attn.query)
    stage.double()
    reference = copy.deepcopy(stage)
    for attention in reference.attentions:
        attention.backend = 'reference'
    x = torch.randn(2, 4, 3, 2, dtype=torch.double)
    found = []
    for each in (stage, reference):
        loss = each(x).square().sum()
        params = list(each.parameters())
        first = torch.autograd.grad(loss, params, retain_graph=True)
        second = torch.autograd.grad(loss, params, create_graph=twice)
        found.append([*first, *second])
        if twice:
            found[-1] += torch.autograd.grad(
                sum(g.square().sum() for g in second), params
            )
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
