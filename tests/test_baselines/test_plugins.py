"""Plugins against the formulas of their papers."""

import sys

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import build_plugin_layer
from torch import nn

from mmela.baselines import AA
from mmela.layers import AttentionState
from tests.helpers.stages import BlockStage

C = 16


def make(type, **kwargs):
    torch.manual_seed(0)
    plugin = build_plugin_layer(dict(type=type, **kwargs), in_channels=C)[1]
    for module in plugin.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return plugin


def count(plugin):
    return sum(p.numel() for p in plugin.parameters())


def test_squeeze_excitation():
    plugin = make('SqueezeExcitation', reduction=4)
    x = torch.randn(2, C, 5, 6)
    first, second = plugin.gate[0].weight, plugin.gate[2].weight
    for b in range(2):
        gate = torch.sigmoid(second @ F.relu(first @ x[b].mean((1, 2))))
        torch.testing.assert_close(plugin(x)[b], gate[:, None, None] * x[b])
    assert count(plugin) == 2 * C * 4


def test_bam():
    plugin = make('BAM', reduction=4, dilation=2)
    x = torch.randn(3, C, 7, 6)

    def norm(layer, value):
        return F.batch_norm(value, None, None, layer.weight, layer.bias, True)

    w0, w1, last = plugin.channel[0], plugin.channel[2], plugin.channel[3]
    y = x.mean((2, 3)) @ w0.weight.T + w0.bias
    channel = norm(last, F.relu(y) @ w1.weight.T + w1.bias)
    convs = [m for m in plugin.spatial if isinstance(m, nn.Conv2d)]
    norms = [m for m in plugin.spatial if isinstance(m, nn.BatchNorm2d)]
    y = x
    for i, (padding, dilation) in enumerate([(0, 1), (2, 2), (2, 2), (0, 1)]):
        y = F.conv2d(
            y, convs[i].weight, convs[i].bias, padding=padding, dilation=dilation
        )
        y = norm(norms[i], y)
        if i < 3:
            y = F.relu(y)
    expected = x + torch.sigmoid(channel[..., None, None] + y) * x
    torch.testing.assert_close(plugin(x), expected)


def test_double_attention():
    plugin = make('DoubleAttention', reduction=2)
    x = torch.randn(2, C, 3, 4)
    a, b, v = plugin.gather(x), plugin.attend(x), plugin.distribute(x)
    z = torch.zeros(2, C // 2, 3, 4)
    for i in range(2):
        maps = [b[i, n].flatten().softmax(0).view(3, 4) for n in range(C // 2)]
        gathered = [(a[i] * m).sum((1, 2)) for m in maps]
        for row in range(3):
            for column in range(4):
                weights = v[i, :, row, column].softmax(0)
                z[i, :, row, column] = sum(w * g for w, g in zip(weights, gathered))
    torch.testing.assert_close(plugin(x), x + plugin.out(z))


def test_eca_and_cbam_are_those_of_timm():
    pytest.importorskip('timm')
    plugin = make('ECA')
    x = torch.randn(2, C, 5, 6)
    weight = plugin.module.conv.weight
    y = F.conv1d(x.mean((2, 3))[:, None], weight, padding='same')
    torch.testing.assert_close(plugin(x), x * y[:, 0].sigmoid()[..., None, None])
    assert weight.shape == (1, 1, 3)  # eq. 12: (4 + 1) / 2, odd
    plugin = make('CBAM').eval()
    assert plugin(x).shape == x.shape
    # Two linear layers, a 7x7 convolution of two maps and its normalization
    assert count(plugin) == 2 * C * (C // 16) + 2 * 49 + 2


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm.layers.eca', None)
    with pytest.raises(ImportError, match=r'ECA needs timm.*pip install .mmela.timm.'):
        make('ECA')


@pytest.mark.parametrize('type', ['SqueezeExcitation', 'BAM', 'DoubleAttention'])
def test_reduction_that_leaves_nothing(type):
    with pytest.raises(ValueError, match='reduction=17 leaves none of 16 channels'):
        make(type, reduction=17)


class Block(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 1, bias=False)
        self.norm1 = nn.Identity()
        self.conv2 = nn.Conv2d(C, C, 3, stride, 1, bias=False)

    def forward(self, x):
        return self.conv2(self.norm1(self.conv1(x)))


@pytest.mark.parametrize('stride', [1, 2])
def test_augmented_convolution(stride):
    torch.manual_seed(0)
    block = Block(stride)
    wide = block.conv2.weight.detach().clone()
    attention = AA(C, keys=0.25, values=0.25, heads=2, min_key=1, max_size=3)
    stage = BlockStage(block)
    stage.attach(0, attention)
    assert torch.equal(block.conv2.weight, wide[:12])  # 16 less 2 heads of 2
    assert (attention.key_dim, attention.value_dim) == (2, 2)
    x = torch.randn(2, C, 8, 6)
    out = stage(x)
    inner = block.conv1(x)
    conv = F.conv2d(inner, block.conv2.weight, stride=stride, padding=1)
    torch.testing.assert_close(out[:, :12], conv)
    if stride == 2:
        inner = F.avg_pool2d(inner, 2)
    qkv = attention.qkv(inner)
    height, width = inner.shape[2:]
    expected = torch.zeros(2, 4, height, width)
    cells = [(i, j) for i in range(height) for j in range(width)]
    for b in range(2):
        for g in range(2):
            q, k = qkv[b, 2 * g : 2 * g + 2], qkv[b, 4 + 2 * g : 6 + 2 * g]
            v = qkv[b, 8 + 2 * g : 10 + 2 * g]
            for i, j in cells:
                scores = []
                for m, n in cells:
                    dy, dx = max(-2, min(2, m - i)), max(-2, min(2, n - j))
                    r = attention.relative_y[dy + 2] + attention.relative_x[dx + 2]
                    scores.append(q[:, i, j] @ (k[:, m, n] + r) / 2**0.5)
                weights = torch.stack(scores).softmax(0)
                expected[b, 2 * g : 2 * g + 2, i, j] = sum(
                    w * v[:, m, n] for w, (m, n) in zip(weights, cells)
                )
    torch.testing.assert_close(out[:, 12:], attention.out(expected))


def test_augmented_convolution_cannot_be_pruned():
    attention = AA(C)
    with pytest.raises(ValueError, match='must stay ACTIVE'):
        attention.attention_state = AttentionState.PRUNED
    with pytest.raises(ValueError, match=r'keys=1.5 is not a number in \(0, 1\)'):
        AA(C, keys=1.5)
