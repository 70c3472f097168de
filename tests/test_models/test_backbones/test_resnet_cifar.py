"""The two ResNets for CIFAR: MMPretrain's, and the bottleneck network."""

import copy
import pickle
import warnings

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.hub import get_config  # noqa: E402
from mmpretrain.registry import MODELS  # noqa: E402

from mmela.layers import LayerAttention  # noqa: E402
from mmela.models.backbones.resnet_cifar import (  # noqa: E402
    ELABottleneckResNet_CIFAR,
    ELAResNet_CIFAR,
)
from mmela.structure import attention_stages  # noqa: E402

# Of all stages, by depth
BLOCKS = {18: 8, 34: 16, 50: 16, 101: 33, 152: 50}
ATTENTION = dict(type='MRLABase', head_dim=16)


@pytest.mark.parametrize('depth', BLOCKS)
def test_configs_of_mmpretrain(depth):
    """One word changed: the same keys and, with zero_init, the same output."""
    cfg = get_config(f'mmpretrain::resnet/resnet{depth}_8xb16_cifar10.py').model
    plain = MODELS.build(cfg)
    cfg.backbone.type = 'ELAResNet_CIFAR'
    assert type(MODELS.build(cfg).backbone) is ELAResNet_CIFAR
    cfg.backbone.layer_attention = dict(type='MRLABase', zero_init=True)
    swapped = MODELS.build(cfg)
    for module in swapped.modules():
        if isinstance(module, LayerAttention):
            module.init_weights()
    missing, unexpected = swapped.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing and all('.layer_attn.' in key for key in missing)
    blocks = sum(
        len(getattr(plain.backbone, name)) for name in plain.backbone.res_layers
    )
    assert len({key.split('.layer_attn.')[0] for key in missing}) == blocks
    images = torch.randn(2, 3, 32, 32)
    plain.eval()
    swapped.eval()
    with torch.no_grad():
        assert torch.equal(swapped(images), plain(images))


@pytest.mark.parametrize('depth', [11, 20, 29, 56, 101, 110])
def test_bottleneck_depths(depth):
    net = MODELS.build(
        dict(
            type='ELABottleneckResNet_CIFAR',
            depth=depth,
            layer_attention=ATTENTION,
        )
    )
    stages = list(attention_stages(net).values())
    assert [len(s.attentions) for s in stages] == [(depth - 2) // 9] * 3
    assert [s.attentions[0].channels for s in stages] == [64, 128, 256]
    assert net(torch.rand(2, 3, 32, 32))[0].shape == (2, 256, 8, 8)
    # Convolutions and the classifier: that is what the depth counts.
    convs = [
        m
        for n, m in net.named_modules()
        if isinstance(m, torch.nn.Conv2d)
        and 'downsample' not in n
        and 'layer_attn' not in n
    ]
    assert len(convs) + 1 == depth


@pytest.mark.parametrize('depth', [2, 18, 50, 19])
def test_no_such_bottleneck_depth(depth):
    for name in ('ELABottleneckResNet_CIFAR', 'BottleneckResNet_CIFAR'):
        with pytest.raises(ValueError, match=f'depth={depth} is not 9n'):
            MODELS.build(dict(type=name, depth=depth))


@pytest.mark.parametrize('depth', [20, 56])
def test_old_name_of_the_bottleneck_network(depth):
    cfg = dict(depth=depth, layer_attention=ATTENTION)
    with pytest.warns(DeprecationWarning, match='ELABottleneckResNet_CIFAR'):
        old = MODELS.build(dict(cfg, type='ELAResNet_CIFAR'))
    new = MODELS.build(dict(cfg, type='ELABottleneckResNet_CIFAR'))
    assert type(old) is type(new) is ELABottleneckResNet_CIFAR
    assert isinstance(old, ELAResNet_CIFAR)
    new.load_state_dict(old.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    old.eval()
    for other in (new, copy.deepcopy(old), pickle.loads(pickle.dumps(old))):
        assert type(other) is ELABottleneckResNet_CIFAR
        other.eval()
        assert torch.equal(other(images)[0], old(images)[0])


def test_depth_101_is_the_network_of_mmpretrain():
    """Both networks have it; ``ELA<X>`` is ``<X>`` with attention."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net = MODELS.build(dict(type='ELAResNet_CIFAR', depth=101))
    assert type(net) is ELAResNet_CIFAR
    assert [len(getattr(net, name)) for name in net.res_layers] == [3, 4, 23, 3]


@pytest.mark.parametrize('depth', [2, 19, 42])
def test_depth_of_neither(depth):
    with pytest.raises(KeyError, match=f'invalid depth {depth}'):
        MODELS.build(dict(type='ELAResNet_CIFAR', depth=depth))
