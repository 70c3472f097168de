import pytest
import torch
import torch.nn.functional as F

from mmela.ops import pool_and_convolve


def plain(x, weight):
    return x.mean((2, 3)), F.conv2d(x, weight, padding=1, groups=x.size(1))


def inputs(dtype=torch.float64, form=torch.contiguous_format):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4, dtype=dtype).to(memory_format=form)
    return x.requires_grad_(), torch.randn(6, 1, 3, 3, dtype=dtype, requires_grad=True)


def test_gradcheck():
    assert torch.autograd.gradcheck(pool_and_convolve, inputs())


@pytest.mark.parametrize('form', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('used', [(0,), (1,), (0, 1)])
def test_gradients_of_some_outputs(used, form):
    x, weight = inputs(form=form)
    for function in (pool_and_convolve, plain):
        outs = function(x, weight)
        loss = sum(outs[i].square().sum() for i in used)
        grads = torch.autograd.grad(loss, (x, weight), allow_unused=True)
        if function is pool_and_convolve:
            ours = grads
    torch.testing.assert_close(ours[0], grads[0])
    if grads[1] is None:
        assert ours[1] is None or not ours[1].any()
    else:
        torch.testing.assert_close(ours[1], grads[1])


@pytest.mark.parametrize('frozen', [0, 1])
def test_frozen(frozen):
    leaves = inputs()
    leaves[frozen].requires_grad_(False)
    sum(o.square().sum() for o in pool_and_convolve(*leaves)).backward()
    assert leaves[frozen].grad is None
    grad = leaves[1 - frozen].grad
    leaves[1 - frozen].grad = None
    sum(o.square().sum() for o in plain(*leaves)).backward()
    torch.testing.assert_close(grad, leaves[1 - frozen].grad)


def test_autocast_and_no_grad():
    x, weight = inputs(torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        pooled, value = pool_and_convolve(x, weight)
        assert value.dtype == torch.bfloat16
        (value.float().sum() + pooled.float().sum()).backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    with torch.no_grad():
        for out, expected in zip(pool_and_convolve(x, weight), plain(x, weight)):
            assert torch.equal(out, expected)


def test_compiled_graph_is_whole():
    x, weight = inputs(torch.float32)
    compiled = torch.compile(pool_and_convolve, fullgraph=True, backend='aot_eager')
    for out, expected in zip(compiled(x, weight), plain(x, weight)):
        torch.testing.assert_close(out, expected)
