"""The Triton kernels on a GPU, or on a CPU in Triton's interpreter.

Run by test_triton_kernels.py: without a GPU, TRITON_INTERPRET=1 must be set
before triton is imported.
"""

import pytest
import torch

from mmela.ops import layer_weighted_sum, triton_kernels
from mmela.ops.layer_weighted_sum import reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def kernels(monkeypatch):
    # Several programs per head, the last one uneven
    blocks = dict(default=dict(block=32, warps=4))
    monkeypatch.setattr(triton_kernels, 'BLOCKS', blocks)
    return triton_kernels


def inputs(t, dtype, form, shape=(2, 12, 5, 3)):
    torch.manual_seed(0)
    attn = torch.rand(shape[0], 3, t).softmax(-1).to(DEVICE, dtype)
    values = [
        torch.randn(shape).to(DEVICE, dtype).to(memory_format=form) for _ in range(t)
    ]
    grad = torch.randn(shape).to(DEVICE, dtype).to(memory_format=form)
    return attn, values, grad


def plain(attn, values, grad):
    """The sum and its gradients by plain operations."""
    leaves = [x.detach().requires_grad_() for x in (attn, *values)]
    out = layer_weighted_sum(leaves[0], leaves[1:], 'reference')
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


FORMS = pytest.mark.parametrize(
    'form', [torch.contiguous_format, torch.channels_last], ids=str
)


@FORMS
@pytest.mark.parametrize('t', [1, 3])
@pytest.mark.parametrize(
    'dtype, tolerance',
    [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
def test_equals_plain_operations(kernels, t, dtype, tolerance, form):
    attn, values, grad = inputs(t, dtype, form)
    out = kernels.forward(attn, values)
    assert out.is_contiguous(memory_format=form)
    grad_attn, grad_values = kernels.backward(grad, attn, values, True, [True] * t)
    expected = plain(attn.double(), [v.double() for v in values], grad.double())
    for result, e in zip([out, grad_attn, *grad_values], expected):
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double(), e, rtol=tolerance, atol=10 * tolerance
        )


@FORMS
def test_only_wanted_gradients(kernels, form):
    attn, values, grad = inputs(3, torch.float32, form)
    _, expected, *values_expected = plain(attn, values, grad)
    none, grads = kernels.backward(grad, attn, values, False, [True, False, True])
    assert none is None and grads[1] is None
    torch.testing.assert_close(grads[0], values_expected[0])
    torch.testing.assert_close(grads[2], values_expected[2])
    only, grads = kernels.backward(grad, attn, values, True, [False] * 3)
    assert grads == [None] * 3
    torch.testing.assert_close(only, expected)


def test_what_the_kernels_do_not_read_is_copied(kernels):
    attn, values, grad = inputs(3, torch.float32, torch.contiguous_format)
    mixed = [
        values[0],
        values[1].to(memory_format=torch.channels_last),
        values[2].transpose(2, 3).contiguous().transpose(2, 3),
    ]
    shifted = torch.empty(values[0].numel() + 1, device=DEVICE)[1:]
    mixed.append(shifted.view_as(values[0]).copy_(values[0]))
    attn = torch.cat([attn, attn[..., :1]], dim=-1)
    torch.testing.assert_close(
        kernels.forward(attn, mixed), plain(attn, mixed, grad)[0]
    )


@pytest.mark.parametrize('t', [1, 3])
@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (2, 24, 1, 7), (1, 96, 7, 7)])
@FORMS
def test_odd_sizes(kernels, shape, t, form):
    """Integers that are 1, which Triton compiles in; programs mostly masked."""
    attn, values, grad = inputs(t, torch.float32, form, shape)
    grads = kernels.backward(grad, attn, values, True, [True] * t)
    results = [kernels.forward(attn, values), grads[0], *grads[1]]
    for result, expected in zip(results, plain(attn, values, grad)):
        torch.testing.assert_close(result, expected)


@FORMS
def test_offsets_beyond_32_bits(form):
    """Maps of 800x1333 pixels, of so many images that 2**31 numbers are passed."""
    memory = torch.cuda.mem_get_info()[0] if DEVICE == 'cuda' else 0
    if memory < 40e9:
        pytest.skip('needs a GPU with 40 GB free')
    shape = (120, 288, 200, 334)
    attn = torch.rand(120, 3, 2, device=DEVICE).softmax(-1)
    values = []
    for _ in range(2):
        value = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16).normal_()
        values.append(value.to(memory_format=form))
    out = triton_kernels.forward(attn, values)
    grads = triton_kernels.backward(values[0], attn, values, True, [True, False])
    for sample in (slice(0, 1), slice(119, 120)):
        part = [v[sample] for v in values]
        expected = plain(attn[sample], part, part[0])
        for result, e in zip([out, grads[0], grads[1][0]], expected):
            torch.testing.assert_close(result[sample], e, rtol=2e-2, atol=2e-2)


def test_values_of_two_data_types(kernels):
    """As where a block leaves autocast: the second is cast, not misread."""
    attn, values, grad = inputs(2, torch.float32, torch.contiguous_format)
    leaves = [v.requires_grad_() for v in (values[0], values[1].bfloat16())]
    out = layer_weighted_sum(attn, leaves, 'triton')
    torch.testing.assert_close(
        out, layer_weighted_sum(attn, leaves, 'reference'), rtol=1e-5, atol=1e-5
    )
    out.backward(grad)
    assert leaves[1].grad.dtype == torch.bfloat16


def test_values_of_two_shapes_are_refused(kernels):
    attn, values, _ = inputs(2, torch.float32, torch.contiguous_format)
    with pytest.raises(ValueError, match='5, 3.*1, 3'):
        kernels.forward(attn, [values[0], values[1][:, :, :1]])


def test_tables_are_where_the_kernels_run():
    """Also the one without any address, for gradients that nobody wants."""
    assert triton_kernels._addresses([None], torch.device('meta')).is_meta


def test_double_precision_is_refused(kernels):
    attn, values, _ = inputs(1, torch.float64, torch.contiguous_format)
    with pytest.raises(ValueError, match='float64.*float32'):
        kernels.forward(attn, values)


def test_first_use_compares_with_plain_operations(monkeypatch):
    triton_kernels.works.cache_clear()
    assert triton_kernels.works(torch.device(DEVICE), torch.float32, reference)
    assert triton_kernels.works(torch.device(DEVICE), torch.bfloat16, reference)


def test_kernels_that_fail_are_left_with_a_warning(monkeypatch):
    triton_kernels.works.cache_clear()
    right = triton_kernels.forward
    monkeypatch.setattr(
        triton_kernels, 'forward', lambda attn, values: right(attn, values) * 1.1
    )
    attn, values, grad = inputs(3, torch.float32, torch.contiguous_format)
    with pytest.warns(UserWarning, match='does not work on .*torch.float32'):
        out = layer_weighted_sum(attn, values, 'triton')
    torch.testing.assert_close(out, plain(attn, values, grad)[0])
    triton_kernels.works.cache_clear()
