"""Tokens: class tokens, maps that are not square, and layouts that look alike."""

import copy

import pytest
import torch
from torch import nn

from mmela import attach_layer_attention
from mmela.arguments import arguments_of
from mmela.registry import find_layer_attention
from mmela.structure import layer_attentions
from tests.helpers.attachable import Conv, Patches, Trunk
from tests.helpers.zoo import (
    AFTER_BLOCKS,
    STARTS_PLAIN,
    equal,
    gap,
    plain,
    run,
    stir,
    timm,
    toolbox,
)

NORMS = {
    'default': {},
    'none': dict(norm_cfg=None),
    'BN': dict(norm_cfg=dict(type='BN')),
    'GN': dict(norm_cfg=dict(type='GN', num_groups=4)),
    'IN': dict(norm_cfg=dict(type='IN', affine=True)),
    'LN2d': dict(norm_cfg=dict(type='mmpretrain.LN2d')),
    'no token norm': dict(token_norm_cfg=None),
}
ARCH = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32)


def with_norms(norm):
    if norm == 'LN2d':
        pytest.importorskip('mmpretrain.models')
    return NORMS[norm]


def picture(size=(16, 24), seed=1):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('attention', STARTS_PLAIN)
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('extra', [0, 1, 2])
def test_zero_init_is_the_plain_network_bit_by_bit(attention, norm, extra):
    """Class and distillation tokens too, in training and evaluation."""
    torch.manual_seed(0)
    network = stir(Patches(8, extra))
    attached = copy.deepcopy(network)
    config = dict(AFTER_BLOCKS[attention], zero_init=True, **with_norms(norm))
    allowed = arguments_of(find_layer_attention(config['type']))
    if not with_norms(norm).keys() <= allowed.keys():
        pytest.skip('has no such norm')
    try:
        attach_layer_attention(attached, config, input_size=(16, 24))
    except ValueError as error:
        # Without a norm of its own a token has nothing to be normalized by
        assert norm in ('no token norm', 'LN2d'), error
        assert 'norm' in str(error)
        return
    for mode in (True, False):
        attached.train(mode), network.train(mode)
        assert equal(run(attached, picture()), run(network, picture()))


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize(
    'make',
    [
        toolbox(
            'mmpretrain', 'VisionTransformer', arch=ARCH, img_size=32, patch_size=8
        ),
        toolbox(
            *('mmpretrain', 'DistilledVisionTransformer'),
            arch=ARCH,
            img_size=32,
            patch_size=8,
        ),
        timm('test_vit', img_size=64),
    ],
    ids=['vit', 'distilled', 'timm'],
)
def test_zero_init_of_vision_transformers(make, norm):
    torch.manual_seed(0)
    network = stir(make())
    attached = copy.deepcopy(network)
    size = (64, 64) if hasattr(network, 'default_cfg') else (32, 32)
    config = dict(type='MRLABase', zero_init=True, **with_norms(norm))
    try:
        attach_layer_attention(attached, config)
    except ValueError as error:
        assert norm in ('no token norm', 'LN2d') and 'norm' in str(error)
        return
    network.eval(), attached.eval()
    assert equal(run(attached, picture(size)), run(network, picture(size)))


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('size', [(16, 24), (24, 16), (8, 32), (32, 8), (16, 16)])
def test_height_and_width_are_not_mixed_up(size, attention):
    """Tokens give what the same network gives on maps (B, H, W, C)."""
    torch.manual_seed(0)
    maps = Patches(8, last=True)
    tokens = Patches(8)
    tokens.load_state_dict(maps.state_dict())
    for network in (maps, tokens):
        # Tried at a size that tells the axes apart, run at any
        attach_layer_attention(network, AFTER_BLOCKS[attention], input_size=(16, 24))
    for seed, module in enumerate(layer_attentions(maps).values()):
        stir(module, seed)
    tokens.load_state_dict(maps.state_dict())
    tokens.eval(), maps.eval()
    (grid,), (flat,) = run(maps, picture(size)), run(tokens, picture(size))
    torch.testing.assert_close(flat, grid.flatten(1, 2))
    assert flat.shape[1] == size[0] * size[1] // 16


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('scale', [1, 2])
def test_vision_transformers_that_are_not_square(flip, scale):
    """A transposed picture gives a transposed map, where weights are symmetric."""
    torch.manual_seed(0)
    size = (32, 64)[:: -1 if flip else 1]
    kwargs = dict(arch=ARCH, patch_size=8, out_type='featmap', out_indices=[1, 3])
    make = toolbox('mmpretrain', 'VisionTransformer', img_size=size, **kwargs)
    network = stir(make())
    attach_layer_attention(network)
    for seed, module in enumerate(layer_attentions(network).values()):
        stir(module, seed)
    symmetric = [m.value.weight for m in layer_attentions(network).values()]
    symmetric.append(network.patch_embed.projection.weight)
    for weight in symmetric:
        weight.data.add_(weight.data.transpose(2, 3).clone())
    other = toolbox('mmpretrain', 'VisionTransformer', img_size=size[::-1], **kwargs)()
    attach_layer_attention(other)
    state_dict = network.state_dict()
    grid = state_dict['pos_embed'][:, 1:].unflatten(1, (size[0] // 8, size[1] // 8))
    turned = grid.transpose(1, 2).flatten(1, 2)
    state_dict['pos_embed'] = torch.cat([state_dict['pos_embed'][:, :1], turned], 1)
    other.load_state_dict(state_dict)
    network.eval(), other.eval()
    x = picture([scale * n for n in size])
    turned_outs = [out.transpose(2, 3) for out in run(other, x.transpose(2, 3))]
    assert gap(run(network, x), turned_outs) < 1e-4


# -- layouts that look alike ---------------------------------------------------


class ChannelsLast(nn.Module):
    """Blocks on maps (B, H, W, C) of any number of channels, at a quarter."""

    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 4, 4)
        self.layers = nn.ModuleList(Residual(channels) for _ in range(3))

    def forward(self, x):
        x = self.proj(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return x


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        return x + self.fc(x)


def channels_first(channels):
    blocks = [Conv(channels, channels) for _ in range(3)]
    return Trunk(nn.Conv2d(3, channels, 4, 4), *blocks)


LAYOUTS = dict(first=channels_first, last=ChannelsLast)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('channels', [8, 12, 16, 24])
@pytest.mark.parametrize(
    'size', [(32, 48), (48, 32), (32, 32), (32, 64), (64, 32), (48, 96), (96, 48)]
)
def test_channels_that_are_as_many_as_rows_or_columns(layout, channels, size):
    """Settled as at a size that leaves no doubt, or refused; not guessed."""
    torch.manual_seed(0)
    network = LAYOUTS[layout](channels)
    clear = copy.deepcopy(network)
    attach_layer_attention(clear, input_size=(100, 124))
    assert {a.channels for a in layer_attentions(clear).values()} == {channels}
    try:
        attach_layer_attention(network, input_size=size)
    except ValueError as error:
        assert 'input_size' in str(error)
        return
    assert list(layer_attentions(network)) == list(layer_attentions(clear))
    network.load_state_dict(clear.state_dict())
    network.eval(), clear.eval()
    for other in ((32, 48), (48, 32), size):
        assert equal(run(network, picture(other)), run(clear, picture(other)))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('channels', [8, 56, 64])
def test_channels_as_at_the_default_size(layout, channels):
    """A trial at 224 x 256 has maps of 56 x 64."""
    torch.manual_seed(0)
    network = LAYOUTS[layout](channels)
    clear = copy.deepcopy(network)
    attach_layer_attention(clear, input_size=(100, 124))
    attach_layer_attention(network)
    network.load_state_dict(clear.state_dict())
    network.eval(), clear.eval()
    assert equal(run(network, picture()), run(clear, picture()))


@pytest.mark.parametrize('name', ['own.channels-last', 'torchvision.swin'])
def test_a_batch_of_any_size(name):
    network = plain(name)
    attach_layer_attention(network, input_size=(48, 64))
    network.eval()
    x = torch.randn(5, 3, 48, 64)
    one = [run(network, x[i : i + 1])[0] for i in range(5)]
    torch.testing.assert_close(torch.cat(one), run(network, x)[0])
