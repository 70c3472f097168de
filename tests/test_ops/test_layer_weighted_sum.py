import pytest
import torch

from mmela.ops import layer_weighted_sum


def reference(attn, values):
    """MRLA eq. 9 on concatenated values, written as one einsum."""
    b, g, _ = attn.shape
    stacked = torch.stack(values, dim=1)  # (B, t, C, H, W)
    stacked = stacked.view(b, len(values), g, -1, *stacked.shape[3:])
    return torch.einsum('bgt,btgdhw->bgdhw', attn, stacked).flatten(1, 2)


@pytest.mark.parametrize('t', [1, 2, 5])
def test_equals_einsum(t):
    attn = torch.rand(2, 4, t)
    values = [torch.randn(2, 12, 5, 3) for _ in range(t)]
    torch.testing.assert_close(
        layer_weighted_sum(attn, values), reference(attn, values))


def test_gradients():
    attn = torch.rand(2, 2, 3, dtype=torch.double, requires_grad=True)
    values = [
        torch.randn(2, 4, 3, 2, dtype=torch.double, requires_grad=True)
        for _ in range(3)
    ]
    assert torch.autograd.gradcheck(
        lambda attn, *values: layer_weighted_sum(attn, values),
        (attn, *values))


def test_memory_format_and_dtype():
    values = [
        torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).bfloat16(
        ) for _ in range(2)
    ]
    out = layer_weighted_sum(torch.rand(2, 2, 2).bfloat16(), values)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.bfloat16


def test_bad_input():
    values = [torch.randn(1, 6, 2, 2)] * 2
    with pytest.raises(ValueError, match='3 layers, but 2 values'):
        layer_weighted_sum(torch.rand(1, 2, 3), values)
    with pytest.raises(ValueError, match='6 channels .* 4 heads'):
        layer_weighted_sum(torch.rand(1, 4, 2), values)
