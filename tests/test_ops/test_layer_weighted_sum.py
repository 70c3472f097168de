import itertools

import pytest
import torch

from mmela.ops import layer_weighted_sum

BACKENDS = ('reference', 'autograd', 'auto', 'compile')
DTYPES = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    # One rounding of the result, and one of each gradient
    torch.float16: dict(rtol=1e-3, atol=1e-3),
    torch.bfloat16: dict(rtol=8e-3, atol=8e-3),
}


def einsum(attn, values):
    """MRLA eq. 9 on concatenated values, in double precision."""
    b, g, _ = attn.shape
    stacked = torch.stack(values, dim=1)  # (B, t, C, H, W)
    stacked = stacked.reshape(b, len(values), g, -1, *stacked.shape[3:])
    return torch.einsum('bgt,btgdhw->bgdhw', attn, stacked).reshape(values[0].shape)


def inputs(t, dtype=torch.float32, form=torch.contiguous_format, batch=3):
    torch.manual_seed(t)
    attn = torch.rand(batch, 4, t, dtype=torch.float64).softmax(-1).to(dtype)
    values = [
        torch.randn(batch, 12, 5, 3, dtype=torch.float64)
        .to(dtype)
        .to(memory_format=form)
        for _ in range(t)
    ]
    return attn, values


def run(attn, values, grad, **kwargs):
    attn = attn.detach().clone().requires_grad_()
    values = [v.detach().clone().requires_grad_() for v in values]
    out = layer_weighted_sum(attn, values, **kwargs)
    out.backward(grad)
    return [out.detach(), attn.grad, *(v.grad for v in values)]


@pytest.mark.parametrize(
    'backend, dtype, form, t',
    list(
        itertools.product(
            BACKENDS, DTYPES, (torch.contiguous_format, torch.channels_last), (1, 2, 5)
        )
    ),
)
def test_equals_einsum(backend, dtype, form, t):
    attn, values = inputs(t, dtype, form)
    grad = torch.randn(3, 12, 5, 3).to(dtype)
    double = [attn.double().requires_grad_()]
    double += [v.double().requires_grad_() for v in values]
    out = einsum(double[0], double[1:])
    out.backward(grad.double())
    results = run(attn, values, grad, backend=backend)
    for result, expected in zip(results, [out, *(d.grad for d in double)]):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected.detach(), **DTYPES[dtype])
    assert results[0].is_contiguous(memory_format=form)


@pytest.mark.parametrize('backend', BACKENDS)
def test_differentiable_twice(backend):
    attn, values = inputs(3, torch.float64, batch=1)
    inputs_ = (attn.requires_grad_(), *(v.requires_grad_() for v in values))

    def total(attn, *values):
        return layer_weighted_sum(attn, values, backend)

    assert torch.autograd.gradcheck(total, inputs_)
    assert torch.autograd.gradgradcheck(total, inputs_)


@pytest.mark.parametrize('needs', [(True, False), (False, True)])
def test_only_wanted_gradients(needs):
    attn, values = inputs(3)
    attn.requires_grad_(needs[0])
    values[1].requires_grad_(needs[1])
    layer_weighted_sum(attn, values, 'autograd').sum().backward()
    assert (attn.grad is not None) == needs[0]
    assert [v.grad is not None for v in values] == [False, needs[1], False]


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_keeps_references_only(backend, dtype, autocast):
    """Of the values, backward keeps the very tensors, not copies of them."""
    attn, values = inputs(4, dtype)
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.add(x.data_ptr()) or x if x.numel() > 4 * 12 else x, lambda x: x
    ), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        layer_weighted_sum(
            attn.requires_grad_(), [v.requires_grad_() for v in values], backend
        )
    assert saved == {v.data_ptr() for v in values}


def test_other_strides():
    """Slices, transposed and expanded values are summed as they are."""
    attn, _ = inputs(3)
    torch.manual_seed(0)
    values = [
        torch.randn(3, 24, 5, 3)[:, ::2],
        torch.randn(3, 5, 3, 12).permute(0, 3, 1, 2),
        torch.randn(1, 12, 5, 1).expand(3, 12, 5, 3),
    ]
    torch.testing.assert_close(layer_weighted_sum(attn, values), einsum(attn, values))


def test_empty_batch():
    attn, values = inputs(2)
    out = layer_weighted_sum(attn[:0], [v[:0] for v in values])
    assert out.shape == (0, 12, 5, 3)


@pytest.mark.skipif(
    not hasattr(torch, 'compiler'), reason='torch 2.0 compiles no autograd functions'
)
@pytest.mark.parametrize('backend', ['auto', 'autograd'])
def test_compiled_graph_is_whole(backend):
    attn, values = inputs(3)
    grad = torch.randn(3, 12, 5, 3)
    expected = run(attn, values, grad, backend=backend)

    def block(attn, *values):
        return layer_weighted_sum(attn * 1, values, backend)

    compiled = torch.compile(block, fullgraph=True, backend='aot_eager')
    attn.requires_grad_()
    for value in values:
        value.requires_grad_()
    out = compiled(attn, *values)
    out.backward(grad)
    results = [out, attn.grad, *(v.grad for v in values)]
    for result, e in zip(results, expected):
        torch.testing.assert_close(result, e)


def test_traced_graph_has_torch_operators_alone():
    attn, values = inputs(3)
    traced = torch.jit.trace(
        lambda attn, *values: layer_weighted_sum(attn, values), (attn, *values)
    )
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert all(kind.startswith(('aten::', 'prim::')) for kind in kinds)
    assert 'prim::PythonOp' not in kinds
    torch.testing.assert_close(traced(attn, *values), einsum(attn, values))


def test_bad_input():
    values = [torch.randn(1, 6, 2, 2)] * 2
    with pytest.raises(ValueError, match='3 layers, but there are 2 values'):
        layer_weighted_sum(torch.rand(1, 2, 3), values)
    with pytest.raises(ValueError, match='0 layers, but there are 0 values'):
        layer_weighted_sum(torch.rand(1, 2, 0), [])
    with pytest.raises(ValueError, match='4 heads do not divide 6 channels'):
        layer_weighted_sum(torch.rand(1, 4, 2), values)
    with pytest.raises(ValueError, match="backend='cuda' .*'compile'"):
        layer_weighted_sum(torch.rand(1, 2, 2), values, 'cuda')
