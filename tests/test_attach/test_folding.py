"""What folds, converts or replaces modules leaves the network's output as it is."""

import copy
import itertools

import pytest
import torch
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmela.structure import layer_attentions
from tests.helpers.zoo import (
    AFTER_BLOCKS,
    ATTENTIONS,
    NETWORKS,
    ONE_OF_EACH,
    WITHIN_BLOCKS,
    attach,
    attached,
    equal,
    gap,
    image,
    plain,
    run,
    tensors,
)

WITH_NORMS = [
    'mmdet.ResNet',
    'mmdet.HRNet',
    'mmdet.CSPDarknet',
    'mmpretrain.EfficientNet',
    'mmseg.ResNetV1c',
    'mmseg.UNet',
    'timm.features',
    'torchvision.resnet18',
    'torchvision.mobilenet_v2',
]
PAIRS = [
    *itertools.product(WITH_NORMS, ('MRLABase', 'MRLALight', 'KCLA')),
    *(('mmdet.ResNet', name) for name in ATTENTIONS),
]
PAIRS = list(dict.fromkeys(PAIRS))
CLOSE = 1e-8  # in double precision


def fold_with_mmcv(network):
    from mmcv.cnn import fuse_conv_bn

    return fuse_conv_bn(network)


def is_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def fold_over_children(network):
    """A convolution and the norm that follows it among the children of a module."""
    last = None
    for name, child in network.named_children():
        if is_norm(child) and last is not None:
            conv = fuse_conv_bn_eval(network._modules[last], child)
            network._modules[last], network._modules[name] = conv, nn.Identity()
            last = None
        elif isinstance(child, nn.Conv2d):
            last = name
        else:
            fold_over_children(child)
    return network


def fold_over_leaves(network):
    """A convolution and the norm that follows it among all modules without any."""
    leaves = [(n, m) for n, m in network.named_modules() if not len(list(m.children()))]
    for (name, conv), (norm_name, norm) in zip(leaves, leaves[1:]):
        if isinstance(conv, nn.Conv2d) and is_norm(norm):
            if conv.out_channels == norm.num_features:
                put(network, name, fuse_conv_bn_eval(conv, norm))
                put(network, norm_name, nn.Identity())
    return network


def put(network, name, module):
    parent, _, last = name.rpartition('.')
    network.get_submodule(parent)._modules[last] = module


FOLDING = dict(
    mmcv=fold_with_mmcv, children=fold_over_children, leaves=fold_over_leaves
)


@pytest.mark.parametrize('name, attention', PAIRS)
@pytest.mark.parametrize('fold', FOLDING)
def test_folding_norms(fold, name, attention):
    x = image(name).double()
    network = plain(name).double()
    before = run(network, x)
    network = FOLDING[fold](network)
    assert gap(run(network, x), before) < CLOSE, 'wrong without attention already'

    network = attached(name, attention).double()
    before = run(network, x)
    assert gap(run(FOLDING[fold](network), x), before) < CLOSE


def gradients(network, x):
    """Whether each attention takes part in training."""
    network.train()
    network.zero_grad()
    torch.manual_seed(0)
    sum(out.square().mean() for out in tensors(network(x))).backward()
    return {
        f'{name}.{key}': param.grad
        for name, attention in layer_attentions(network).items()
        for key, param in attention.named_parameters()
    }


def same_gradients(one, other):
    """Whether they agree but for rounding."""
    assert one.keys() == other.keys()
    for key, grad in one.items():
        assert (grad is None) == (other[key] is None), key
        if grad is not None:
            torch.testing.assert_close(grad, other[key], rtol=1e-6, atol=1e-9)
    return any(grad is not None and grad.abs().sum() > 0 for grad in one.values())


@pytest.mark.parametrize('name, attention', PAIRS)
def test_sync_bn_and_back(name, attention):
    """Whichever is taken: torch's converter or mmengine's."""
    x = image(name).double()
    network = attached(name, attention).double()
    expected = gradients(copy.deepcopy(network), x)
    before = run(network, x)
    for convert in (
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda net: convert_sync_batchnorm(net, 'torch'),
    ):
        synced = convert(copy.deepcopy(network))
        synced.eval()
        kinds = {type(m) for m in synced.modules() if is_norm(m)}
        assert kinds == {nn.SyncBatchNorm}
        # In training it takes several processes; in evaluation it is a plain BN
        assert gap(run(synced, x), before) < CLOSE
        back = revert_sync_batchnorm(synced)
        back.eval()
        assert gap(run(back, x), before) < CLOSE
        assert same_gradients(gradients(back, x), expected)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_sync_bn_of_a_config(scope, attention):
    """As all configs of mmseg have it; one process turns it into a plain BN."""
    from mmengine.registry import MODELS

    pytest.importorskip(f'{scope}.models')
    networks = []
    for kind in ('BN', 'SyncBN'):
        torch.manual_seed(0)
        cfg = dict(
            depth=18, base_channels=16, norm_eval=False, norm_cfg=dict(type=kind)
        )
        network = MODELS.build(
            dict(
                type='mmela.WithLayerAttention',
                backbone=dict(type=f'{scope}.ResNet', **cfg),
                layer_attention=ATTENTIONS[attention],
                input_size=(48, 64),
            )
        )
        networks.append(revert_sync_batchnorm(network).double())
    one, other = networks
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 48, 64).double()
    assert same_gradients(gradients(other, x), gradients(one, x))


def renew(kind):
    """Replace each module of a kind by a new one that computes the same."""

    def replace_(network):
        for name, child in network.named_children():
            if type(child) is kind:
                new = copy.deepcopy(child)
                # A new object without the hooks of the old one
                for hooks in [k for k in vars(new) if k.endswith('_hooks')]:
                    vars(new)[hooks] = type(vars(new)[hooks])()
                setattr(network, name, new)
            else:
                replace_(child)
        return network

    return replace_


KINDS = (nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.Linear, nn.LayerNorm)


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    'name, attention',
    [
        *itertools.product(ONE_OF_EACH, ('MRLABase', 'MRLALight')),
        *(('mmdet.ResNet', name) for name in ('KCLA', 'DLALight', *WITHIN_BLOCKS)),
    ],
)
def test_modules_that_are_replaced(kind, name, attention):
    x = image(name).double()
    network = attached(name, attention).double()
    expected = gradients(copy.deepcopy(network), x)
    before = run(network, x)
    network = renew(kind)(network)
    network.eval()
    assert equal(run(network, x), before)
    assert same_gradients(gradients(network, x), expected)


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
def test_preparing_quantization(attention):
    """Observers alone change nothing; neither does a fake quantization that is off."""
    from torch.ao import quantization as tools

    name = 'torchvision.resnet18'
    network = attached(name, attention)
    x = image(name)
    expected = gradients(copy.deepcopy(network), x)
    before = run(network, x)
    pairs = [['conv1', 'bn1', 'relu']]
    for block in [f'layer{i}.{j}' for i in (1, 2, 3, 4) for j in (0, 1)]:
        pairs += [[f'{block}.conv1', f'{block}.bn1']]
        pairs += [[f'{block}.conv2', f'{block}.bn2']]
    fused = tools.fuse_modules(network, pairs)
    network.qconfig = tools.get_default_qconfig('fbgemm')
    fused.qconfig = network.qconfig
    assert gap(run(tools.prepare(fused), x), before) < 1e-3

    network.train()
    network.qconfig = tools.get_default_qat_qconfig('fbgemm')
    prepared = tools.prepare_qat(tools.fuse_modules_qat(network, pairs))
    prepared.apply(tools.disable_fake_quant).apply(tools.disable_observer)
    prepared.eval()
    assert gap(run(prepared, x), before) < 1e-3
    found = gradients(prepared, x)
    assert {k for k, grad in found.items() if grad is None} == {
        k for k, grad in expected.items() if grad is None
    }
    assert len(layer_attentions(prepared)) == len(layer_attentions(network)) == 8


def test_an_attention_is_all_that_is_added():
    """Nothing but ``layer_attn`` of blocks: no other module, buffer or hook's owner."""
    for name in NETWORKS:
        network, other = plain(name), attach(plain(name), name)
        added = set(dict(other.named_modules())) - set(dict(network.named_modules()))
        assert {key.split('.layer_attn')[0] + '.layer_attn' for key in added} == set(
            layer_attentions(other)
        ), name
        assert all('.layer_attn' in key for key in added), name
        assert list(dict(other.named_children())) == list(
            dict(network.named_children())
        ), name
