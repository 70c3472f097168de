"""Published checkpoints against independent networks in their key layout."""

import argparse
import functools
import random
import runpy
from pathlib import Path

import pytest
import torch

from mmela.command_line import one_line
from mmela.convert.published import (
    ARCHS,
    convert_published,
    detect_arch,
    part_of,
)
from mmela.layers import AttentionState
from mmela.layers.state import decode, decode_text
from tests.helpers.published_networks import (
    CELLS,
    PublishedDeiT,
    PublishedNetwork,
    PublishedUNet,
)

TOOL = Path(__file__).resolve().parents[2] / 'tools/convert/published.py'
IMAGENET = (3, 4, 6, 3)
# Architecture, blocks, stem, head_dim, and more, of what was published
NETWORKS = dict(
    mrla_base=('mrla_base', IMAGENET, 'deep', 16),
    mrla_base_channel_wise=('mrla_base', IMAGENET, 'deep', 1, dict(width=2)),
    mrla_base_32x4d=('mrla_base', IMAGENET, 'deep', 16, dict(groups=4)),
    mrla_base_no_relu=('mrla_base_no_relu', IMAGENET, '7x7', 16),
    mrla_light=('mrla_light', IMAGENET, '7x7', 32),
    mla_eq4=('mla_eq4', IMAGENET, '7x7', 32),
    kcla=('kcla', IMAGENET, '7x7', 16),
    kcla_restart=('kcla', (3, 4, 23, 3), '7x7', 16),
    kcla_first=('kcla_first', (3, 4, 23, 3), '7x7', 16),
    dla_light=('dla_light', IMAGENET, '7x7', 32, dict(reduction=16)),
    dla_light_20=('dla_light', IMAGENET, '7x7', 32, dict(reduction=5, width=16)),
    cifar_mla=('mla', (3, 3, 3), '3x3', 16),
    cifar_linear=('linear', (3, 3, 3), '3x3', 8),
    cifar_linear_no_relu=('linear_no_relu', (3, 3, 3), '3x3', 8),
    cifar_hydra=('hydra', (3, 3, 3), '3x3', 16),
    cifar_focused=('focused', (3, 3, 3), '3x3', 16),
    cifar_mrla_base=('mrla_base', (3, 3, 3), '3x3', 16),
    cifar_mrla_light=('mrla_light', (2, 2, 2), '3x3', 16),
    cifar_kcla=('kcla', (3, 3, 3), '3x3', 16),
    cifar_dla_light=('dla_light', (2, 2, 2), '3x3', 16),
    cifar_dla_light_32=('dla_light', (2, 2, 2), '3x3', 32),
    cifar_dla_base=('dla_base', (3, 3, 3), '3x3', 16),
    cifar_dia=('dia', (3, 3, 3), '3x3', 16),
)
# Those of which no tensor tells the channels of a head, and the code has several
ASKED = {
    *('mrla_base', 'mrla_base_channel_wise', 'mrla_base_32x4d', 'mrla_base_no_relu'),
    *('cifar_mla', 'cifar_mrla_base', 'cifar_mrla_light', 'cifar_dla_light'),
    *('cifar_dla_light_32', 'cifar_dla_base'),
}


def network(name, **kwargs):
    arch, blocks, stem, head_dim, *more = NETWORKS[name]
    return PublishedNetwork(arch, blocks, stem, head_dim, **dict(*more, **kwargs))


def convert(name, state_dict=None, **kwargs):
    """With what the tool asks for said."""
    if state_dict is None:
        state_dict = network(name).state_dict
    if name in ASKED:
        kwargs.setdefault('head_dim', NETWORKS[name][3])
    return convert_published(state_dict, NETWORKS[name][0], **kwargs)


def tool(*args):
    runpy.run_path(str(TOOL))['main'](list(map(str, args)))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', NETWORKS)
def test_same_outputs(name):
    """Of each stage, and of the classifier; no key missing or unexpected."""
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS

    published = network(name)
    converted = convert(name, published.state_dict)
    backbone = converted.backbone
    stages = len(NETWORKS[name][1])
    model = (
        MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(backbone, out_indices=range(stages)),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(
                    type='LinearClsHead',
                    num_classes=5,
                    in_channels=published.state_dict['fc.weight'].shape[1],
                ),
            )
        )
        .double()
        .eval()
    )
    model.load_state_dict(converted.state_dict, strict=True)
    x = torch.randn(2, 3, 32, 48, dtype=torch.double)
    with torch.no_grad():
        outs, scores = published.forward(x)
        assert len(model.backbone(x)) == stages
        for found, expected in zip(model.backbone(x), outs):
            close(found, expected)
        close(model(x, mode='tensor'), scores)


@pytest.mark.parametrize(
    'name',
    [
        *('mrla_base', 'mrla_base_32x4d', 'mrla_light', 'kcla', 'kcla_restart'),
        *('kcla_first', 'dla_light'),
    ],
)
def test_same_outputs_in_mmdet(name):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    from mmdet.registry import MODELS

    published = network(name, light_name='mla')
    converted = convert(name, published.state_dict, target='detector')
    backbone = MODELS.build(converted.backbone).double()
    backbone.eval()  # returns None in mmdet
    backbone.load_state_dict(part_of(converted.state_dict, 'backbone.'), strict=True)
    x = torch.randn(1, 3, 32, 48, dtype=torch.double)
    with torch.no_grad():
        outs = backbone(x)
        assert len(outs) == 4
        for found, expected in zip(outs, published.forward(x)[0]):
            close(found, expected)


@pytest.mark.parametrize('newest', [False, True])
def test_same_outputs_of_the_unet(newest):
    pytest.importorskip('mmseg', exc_type=ImportError)
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    published = PublishedUNet(newest=newest)
    converted = convert_published(published.state_dict, target='segmentor')
    dropped = converted.dropped
    folder = Path(__file__).resolve().parents[2] / 'configs' / 'unet'
    cfg = Config.fromfile(folder / 'unet_r18_kcla_kvasir-256x256.py').model
    cfg.backbone = converted.backbone
    cfg.decode_head.scale = 2
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg).double().eval()
    model.load_state_dict(converted.state_dict, strict=True)
    x = torch.randn(2, 3, 32, 48, dtype=torch.double)
    with torch.no_grad():
        expected = published.forward(x)
        found = model(x, mode='tensor')
    assert found.shape == expected.shape == (2, 1, 32, 48)
    close(found, expected)
    cfg.decode_head.scale = None  # and so it is not the same
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg).double().eval()
    model.load_state_dict(converted.state_dict, strict=True)
    assert (model(x, mode='tensor') - expected).abs().max() > 1e-3
    # Scales of 8 attentions, 11 biases before a norm, and what is never read: a
    # norm, and the way into the first stage
    assert sum(key.endswith('.norm_d') for key in dropped) == 8
    assert sum('into the mean' in reason for reason in dropped.values()) == 11
    assert sum('never reads it' in reason for reason in dropped.values()) == 5 + 7


def test_unets_that_cannot_be_converted():
    state_dict = PublishedUNet().state_dict
    for kwargs in (dict(), dict(target='detector')):
        with pytest.raises(
            ValueError, match="arch='kcla_unet' needs target='segmentor'"
        ):
            convert_published(state_dict, **kwargs)
    with pytest.raises(ValueError, match='do not go together'):
        convert('cifar_kcla', target='segmentor')
    with pytest.raises(
        ValueError, match='1 keys are unknown for arch=.*: encoder.conv9.weight'
    ):
        extra = {'encoder.conv9.weight': torch.rand(1)}
        convert_published({**state_dict, **extra}, target='segmentor')
    key = 'encoder.layer2.attention.0.adjust_channel.0.weight'
    with pytest.raises(ValueError, match=rf'{key} has shape \(64, 4, 1, 1\), but'):
        grouped = {key: state_dict[key][:, :4]}
        convert_published({**state_dict, **grouped}, target='segmentor')
    key = 'up2.conv.double_conv.3.bias'
    with pytest.raises(
        ValueError, match=rf'{key} has shape \(1,\), but up2.*4.running'
    ):
        other = {key: torch.rand(1)}
        convert_published({**state_dict, **other}, target='segmentor')
    del state_dict['up2.conv.double_conv.3.weight']
    with pytest.raises(
        ValueError, match='missing.*: decode_head.steps.1.1.conv.weight'
    ):
        convert_published(state_dict, target='segmentor')


@pytest.mark.parametrize('name', NETWORKS)
def test_each_layer_of_the_reference_counts(name):
    """So that equal outputs tell something: the attention changes them."""
    published = network(name)
    x = torch.randn(2, 3, 32, 48, dtype=torch.double)
    scores = published.forward(x)[1]
    block = len(published.blocks) - 1, published.blocks[-1] - 1
    attention = published.attention_name(*block)
    arch = NETWORKS[name][0]
    names = [] if arch == 'dia' else ['Wq', 'Wk', 'Wv']
    if arch.startswith('kcla'):
        first = published.attention_name(1, 0)
        names += [published.part('head'), 'bn_attention']
        weights = [f'{first}.{published.part(x)}' for x in ('reduce', 'key', 'norm')]
    elif arch == 'dia':
        weights = []
    else:
        weights = [published.norm_name(*block)]
    if arch in CELLS:
        cell = published.cell_name(block[0])
        weights += [f'{cell}.lstm.{x}.0.seq.2' for x in ('w_ih', 'w_hh')]
    for weight in weights + [f'{attention}.{name}' for name in names]:
        weight = published.state_dict[f'{weight}.weight']
        if arch == 'hydra':  # whose query and key have norm 1
            weight = weight[..., :1]
        weight.mul_(2)  # a sign would not change the norm of KCLA's keys
        # Ten times what is allowed between the two networks, or more
        least = 1e-4 if name in ('mla_eq4', 'cifar_hydra') else 1e-3
        assert (published.forward(x)[1] - scores).abs().max() > least
        weight.div_(2)
    close(published.forward(x)[1], scores)


def test_keys_of_a_block():
    """Query and key cannot be told apart by MRLA-light's outputs."""
    published = network('mrla_light')
    old = published.state_dict
    result = convert_published(old)
    converted = result.state_dict
    assert result.dropped == {}
    assert result.mapped['fc.bias'] == 'head.fc.bias'
    before, after = 'layer3.2.', 'backbone.layer3.2.'
    pairs = {
        'mrla.mrla.Wq.weight': 'layer_attn.query.weight',
        'mrla.mrla.Wk.weight': 'layer_attn.key.weight',
        'mrla.mrla.Wv.weight': 'layer_attn.value.weight',
        'bn_mrla.running_var': 'layer_attn.norm.running_var',
        'conv2.weight': 'conv2.weight',
    }
    for a, b in pairs.items():
        assert converted[after + b] is old[before + a]
    close(
        converted[after + 'layer_attn.lambda_o'], old[before + 'mrla.lambda_t'][:, 0, 0]
    )
    state = converted[after + 'layer_attn.state']
    assert decode(state) == (AttentionState.ACTIVE, True)
    # State and signature, which keeps it from other attentions with these keys
    assert len(converted) == len(old) + 2 * sum(IMAGENET)
    signature = decode_text(converted[after + 'layer_attn.signature'])
    assert 'MRLALight(head_dim=32' in signature


def test_deep_stem_differs_between_the_toolboxes():
    old = network('mrla_base').state_dict
    for target, names in (
        (
            'classifier',
            [
                'backbone.stem.0.conv',
                'backbone.stem.0.bn',
                'backbone.stem.2.conv',
                'backbone.stem.2.bn',
            ],
        ),
        (
            'detector',
            [
                'backbone.stem.0',
                'backbone.stem.1',
                'backbone.stem.6',
                'backbone.stem.7',
            ],
        ),
        ('backbone', ['stem.0.conv', 'stem.0.bn', 'stem.2.conv', 'stem.2.bn']),
    ):
        new, dropped = convert('mrla_base', old, target=target)[1::3]
        for name, was in zip(names, ['conv1.0', 'conv1.1', 'conv1.6', 'bn1']):
            assert new[f'{name}.weight'] is old[f'{was}.weight']
        assert ('fc.weight' in dropped) == (target != 'classifier')


def test_drops_what_the_published_code_never_uses():
    for name in ('kcla', 'cifar_kcla'):
        published = network(name)
        dropped = convert_published(published.state_dict).dropped
        first = published.attention_name(0, 0)
        scales = {key for key in published.state_dict if 'norm_d' in key}
        assert set(dropped) - scales == {
            key
            for key in published.state_dict
            if key.startswith((f'{first}.adjust', f'{first}.u_'))
        }
        assert len(set(dropped) - scales) == 7
        assert scales <= set(dropped)
        assert all(dropped.values())
    dropped = convert('cifar_mrla_base').dropped
    assert {key.split('.')[0] for key in dropped} == {'finalbn'}


@pytest.mark.parametrize('name', NETWORKS)
def test_detects_the_architecture(name):
    arch = NETWORKS[name][0]
    keys = network(name).state_dict
    if arch in ('mla', 'hydra') or arch.startswith(('mrla_base', 'linear')):
        with pytest.raises(ValueError, match='linear_no_relu, hydra have the same'):
            detect_arch(keys)
        with pytest.raises(ValueError, match='set arch to one'):
            convert_published(keys)
    else:
        assert detect_arch(keys) == arch


def test_config_of_the_backbone():
    for name, expected in (
        (
            'mrla_base',
            dict(
                type='ELAResNet',
                depth=50,
                deep_stem=True,
                stem_channels=12,
                base_channels=8,
                layer_attention=dict(type='MRLABase', head_dim=16),
            ),
        ),
        (
            'mrla_light',
            dict(
                type='ELAResNet',
                depth=50,
                stem_channels=12,
                base_channels=8,
                layer_attention=dict(type='MRLALight', head_dim=32),
            ),
        ),
        (
            'cifar_kcla',
            dict(
                type='ELABottleneckResNet_CIFAR',
                depth=29,
                stem_channels=12,
                base_channels=8,
                layer_attention=dict(type='KCLA', head_dim=16),
            ),
        ),
    ):
        for target in ('classifier', 'backbone'):
            assert convert(name, target=target).backbone == expected
    wide = PublishedNetwork('mrla_base', (1, 1, 1), '3x3', 16, width=16, stem_width=16)
    assert convert_published(
        wide.state_dict, 'mrla_base', head_dim=16
    ).backbone == dict(
        type='ELABottleneckResNet_CIFAR',
        depth=11,
        layer_attention=dict(type='MRLABase', head_dim=16),
    )
    resnext = convert('mrla_base_32x4d').backbone
    assert resnext['type'] == 'ELAResNeXt' and resnext['base_channels'] == 8
    assert (resnext['groups'], resnext['width_per_group']) == (4, 4)
    # Not of 20, by which 64 and 80 are 16 times wider alike in other networks
    assert convert('dla_light_20').backbone['layer_attention']['reduction'] == 5
    for blocks, stem in (((1, 2), '7x7'), ((2, 2, 1), '3x3'), ((2, 2), '3x3')):
        odd = PublishedNetwork('mrla_light', blocks, stem, 32)
        with pytest.raises(
            ValueError,
            match=f'no published .* has {blocks}'.replace('(', r'\(').replace(
                ')', r'\)'
            ),
        ):
            convert_published(odd.state_dict)


@pytest.mark.parametrize('name', NETWORKS)
def test_channels_of_a_head(name):
    """Asked for where no tensor tells; where one does, another is refused."""
    arch, _, stem, head_dim, *_ = NETWORKS[name]
    state_dict = network(name).state_dict
    if name in ASKED:
        kind = 'CIFAR' if stem == '3x3' else 'ImageNet or COCO'
        with pytest.raises(
            ValueError, match=f'set head_dim. .* on {kind}.*{head_dim} '
        ):
            convert_published(state_dict, arch)
    elif arch == 'dia':
        with pytest.raises(
            ValueError, match='head_dim=16 is set, but DIA has no heads'
        ):
            convert_published(state_dict, arch, head_dim=16)
    else:
        result = convert_published(state_dict, arch)
        assert result.backbone['layer_attention']['head_dim'] == head_dim
    if arch.startswith('kcla'):
        with pytest.raises(
            ValueError, match='head_dim=8, but the heads .* have 16 chan'
        ):
            convert_published(state_dict, arch, head_dim=8)
    elif arch != 'dia':
        with pytest.raises(ValueError, match='head_dim=7 does not divide'):
            convert_published(state_dict, arch, head_dim=7)


def test_detector():
    old = {
        f'backbone.{key}': value
        for key, value in network('kcla').state_dict.items()
        if not key.startswith('fc.')
    }
    extra = {
        'neck.fpn_convs.0.conv.weight': torch.rand(2),
        'rpn_head.rpn_conv.weight': torch.rand(2),
        'roi_head.bbox_head.fc_cls.weight': torch.rand(2),
    }
    old.update(extra)
    new, dropped = convert_published(old, target='detector')[1::3]
    assert all(new[key] is value for key, value in extra.items())
    assert not set(extra) & set(dropped)
    bare, dropped = convert_published(old, target='backbone')[1::3]
    assert set(extra) <= set(dropped)
    assert {f'backbone.{key}' for key in bare} == set(new) - set(extra)
    with pytest.raises(ValueError, match='from a detector and has no classif'):
        convert_published(old, target='classifier')
    with pytest.raises(
        ValueError, match="1 keys are unknown for arch='kcla': some_head.x"
    ):
        convert_published({**old, 'some_head.x': torch.rand(1)}, target='detector')


def test_wrong_arguments():
    old = network('cifar_mla').state_dict
    with pytest.raises(
        ValueError,
        match="arch='mrla' is unknown; allowed are mrla_base, mrla_base_no_relu, mrla_",
    ):
        convert_published(old, 'mrla')
    with pytest.raises(
        ValueError,
        match="target='head' is unknown; allowed are classifier, detector, backbone",
    ):
        convert_published(old, 'mla', target='head')
    with pytest.raises(ValueError, match='match no published network'):
        convert_published({'conv1.weight': torch.rand(1)})
    with pytest.raises(ValueError, match='match no published network'):
        convert_published({})


@pytest.mark.parametrize(
    'key',
    [
        'layer2.0.se.fc.0.weight',
        'layer2.0.mrla.mrla.Wx.weight',
        'layer2.0.layers.mrla.Wq.weight',
        'fc2.weight',
        'module.x',
    ],
)
def test_unaccounted_key(key):
    old = network('mrla_light').state_dict
    with pytest.raises(ValueError) as error:
        convert_published({**old, key: torch.rand(1), 'other': torch.rand(1)})
    assert str(error.value) == (
        f"2 keys are unknown for arch='mrla_light': {key}, other"
    )


@pytest.mark.parametrize('key', ['bn1.scale', 'layer4.5.conv1.weight', 'fc.scale'])
def test_key_that_only_the_network_can_refuse(key):
    old = network('mrla_light').state_dict
    with pytest.raises(ValueError, match=f'(unknown|no published).*({key}|4, 6, 4)'):
        convert_published({**old, key: torch.rand(1)})


def test_two_keys_for_one():
    old = network('mrla_light').state_dict
    with pytest.raises(
        ValueError,
        match='same new key: backbone.layer2.0.conv1.weight, '
        'backbone.layer2.1.layer_attn.value.weight$',
    ):
        convert_published(
            {
                **old,
                'stages.1.0.conv1.weight': torch.rand(1),
                'layer2.1.mrla.mla.Wv.weight': torch.rand(1),
            }
        )


def test_another_arch():
    with pytest.raises(ValueError, match='unknown for .*lambda_t'):
        convert_published(network('mrla_light').state_dict, 'mrla_base')
    with pytest.raises(ValueError, match='missing.*lambda_o'):
        convert_published(network('cifar_mla').state_dict, 'mrla_light', head_dim=16)
    with pytest.raises(ValueError, match='unknown for'):
        convert_published(network('kcla').state_dict, 'mrla_base')


@pytest.mark.parametrize(
    'name, old, new',
    [
        (
            'mrla_base',
            'stages.1.2.mrla.mrla.Wk.weight',
            'backbone.layer2.2.layer_attn.key.weight',
        ),
        ('mrla_base', 'conv1.4.running_var', 'backbone.stem.1.bn.running_var'),
        ('mrla_light', 'layer4.2.bn3.bias', 'backbone.layer4.2.bn3.bias'),
        ('mrla_light', 'bn1.weight', 'backbone.bn1.weight'),
        (
            'mrla_light',
            'layer2.0.downsample.1.weight',
            'backbone.layer2.0.downsample.1.weight',
        ),
        (
            'kcla',
            'layer2.attention.0.u_Wk.weight',
            'backbone.layer2.0.layer_attn.cross_stage.key.weight',
        ),
        ('cifar_kcla', 'fc.bias', 'head.fc.bias'),
    ],
)
def test_missing_parts(name, old, new):
    state_dict = network(name).state_dict
    del state_dict[old]
    with pytest.raises(ValueError, match='missing: ') as error:
        convert(name, state_dict)
    assert str(error.value).endswith((f': {new}', f': {new[len("backbone.") :]}'))


def test_missing_block_and_optional_count():
    state_dict = network('cifar_mrla_light').state_dict
    without = {
        key: value
        for key, value in state_dict.items()
        if not key.endswith('num_batches_tracked')
    }
    convert('cifar_mrla_light', without)  # as from torch < 0.4.1
    without = {
        key: value
        for key, value in state_dict.items()
        if not key.startswith('layer2.0.')
    }
    with pytest.raises(ValueError, match=r'missing.*: layer2.0.conv2.weight'):
        convert('cifar_mrla_light', without)


def test_networks_that_compute_something_else():
    old = network('cifar_kcla').state_dict
    scaled = dict(old)
    key = 'stages.0.0.kcla.norm_d'
    scaled[key] = 4 * old[key]
    with pytest.raises(ValueError, match=f'{key} starts with .* the published values'):
        convert_published(scaled)
    # Restarts at a block that another stage has too, which does not
    again = dict(network('cifar_kcla').state_dict)
    first = 'stages.2.0.kcla.'
    for key in list(again):
        if key.startswith((f'{first}u_', f'{first}adjust')):
            again[key.replace('stages.2.0', 'stages.2.1')] = again[key]
    with pytest.raises(ValueError, match='missing.*layer1.1.layer_attn.cross_stage'):
        convert_published(again)


def test_restarts():
    result = convert('kcla_restart')
    assert (
        'channels are the same'
        in result.dropped['layer3.attention.11.adjust_channel.weight']
    )
    assert result.backbone['layer_attention'] == dict(
        type='KCLA', head_dim=16, restart_blocks=(11,)
    )


@pytest.mark.parametrize('light', [False, True])
def test_same_outputs_of_deit(light):
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS

    published = PublishedDeiT(light)
    arch = 'deit_mrla_light' if light else 'deit_mrla_base'
    assert detect_arch(published.state_dict) == arch
    converted = convert_published(published.state_dict)
    assert not converted.dropped
    backbone = converted.backbone
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=128)
    model = MODELS.build(
        dict(type='ImageClassifier', backbone=backbone, neck=None, head=head)
    )
    model.double().eval()
    model.load_state_dict(converted.state_dict, strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        token, scores = published.forward(x)
        close(model.backbone(x)[0], token)
        close(model(x, mode='tensor'), scores)
    # Equal outputs tell something: the attention of each block changes them
    for block in (1, 3, 4):
        for leaf in ('mrla.Wq', 'mrla.Wk', 'mrla.Wv', 'normx'):
            weight = published.state_dict[f'blocks.{block}.mrla.{leaf}.weight']
            weight.mul_(-1)
            changed = (published.forward(x)[1] - scores).abs().max()
            # A key alone asks nothing of a softmax over one block
            assert changed > 1e-6 or (not light and block == 4), (block, leaf)
            weight.mul_(-1)


def test_config_of_deit():
    for dims, depth, expected in (
        (192, 12, dict(embed_dims=192, num_layers=12)),
        (192, 4, dict(num_heads=3, num_layers=4)),
    ):
        published = PublishedDeiT(True, dims=dims, depth=depth)
        result = convert_published(published.state_dict, target='backbone')
        assert set(result.dropped) == {'head.weight', 'head.bias'}
        cfg = result.backbone
        assert cfg['img_size'] == 32 and cfg['patch_size'] == 8
        if isinstance(expected, str):
            assert cfg['arch'] == expected
        else:
            assert expected.items() <= cfg['arch'].items()
            assert cfg['arch']['feedforward_channels'] == 2 * dims


def test_wrong_deits():
    state_dict = PublishedDeiT(False).state_dict
    for other in (state_dict, network('cifar_kcla').state_dict):
        with pytest.raises(ValueError, match="target='detector' is for ResNets"):
            convert_published(other, target='detector')
    with pytest.raises(ValueError, match='1 keys are unknown .*: dist_token'):
        convert_published({**state_dict, 'dist_token': torch.rand(1, 1, 128)})
    with pytest.raises(ValueError, match='missing.*identity_norm.bias'):
        convert_published(state_dict, 'deit_mrla_light')
    del state_dict['blocks.2.norm1.bias']
    with pytest.raises(ValueError, match='missing: backbone.layers.2.ln1.bias'):
        convert_published(state_dict)


def test_input_is_left_alone():
    published = network('cifar_kcla')
    before = {k: v.clone() for k, v in published.state_dict.items()}
    convert_published(published.state_dict)
    assert before.keys() == published.state_dict.keys()
    for key, value in published.state_dict.items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize('wrapper', ['state_dict', 'model', 'model_state_dict', None])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_tool(tmp_path, capsys, wrapper, prefix):
    old = network('cifar_kcla').state_dict
    content = {prefix + key: value for key, value in old.items()}
    if wrapper:
        content = {
            'epoch': 3,
            'best_acc1': torch.tensor(71.0),
            wrapper: content,
            'optimizer': dict(state={}, param_groups=[dict(lr=0.1)]),
        }
    src, dst = tmp_path / 'model_best.pth.tar', tmp_path / 'new' / 'kcla.pth'
    torch.save(content, src)
    tool(src, dst)
    saved = torch.load(dst, weights_only=True)
    expected = convert_published(old)
    dropped = expected.dropped
    assert saved['state_dict'].keys() == expected.state_dict.keys()
    for key, value in expected.state_dict.items():
        assert torch.equal(saved['state_dict'][key], value)
    backbone = saved['meta']['backbone']
    assert backbone == expected.backbone
    out = capsys.readouterr().out
    # A row of the table stands for the nine blocks
    row = [line for line in out.splitlines() if 'kcla.Wv.weight' in line]
    assert [line.split() for line in row] == [
        [
            '9',
            'stages.*.*.kcla.Wv.weight',
            '->',
            'backbone.layer*.*.layer_attn.value.weight',
        ]
    ]
    counts = [
        int(line.split()[0])
        for line in out.splitlines()
        if ' -> ' in line or ' dropped: ' in line
    ]
    assert sum(counts) == len(old)
    assert f'{len(old) - len(dropped)} of {len(old)} tensors' in out
    assert f'{len(dropped)} dropped' in out
    assert str(backbone) in out


def test_tool_takes_arch_and_target(tmp_path):
    src, dst = tmp_path / 'mla.pth', tmp_path / 'out.pth'
    torch.save(network('cifar_mla').state_dict, src)
    tool(src, dst, '--arch', 'mla', '--target', 'backbone', '--head-dim', '16')
    saved = torch.load(dst, weights_only=True)
    assert saved['meta']['backbone']['layer_attention']['type'] == 'MLA'
    assert 'layer1.0.layer_attn.query.weight' in saved['state_dict']
    assert not any(key.startswith('head.') for key in saved['state_dict'])


def test_tool_with_the_unet(tmp_path, capsys):
    src, dst = tmp_path / 'unet.pth', tmp_path / 'out.pth'
    torch.save(PublishedUNet().state_dict, src)
    tool(src, dst, '--target', 'segmentor')
    assert 'decode_head=dict(scale=2)' in capsys.readouterr().out
    backbone = torch.load(dst, weights_only=True)['meta']['backbone']
    assert backbone['type'] == 'ELAUNetResNet' and backbone['depth'] == 18


def test_heads_of_several_widths():
    state_dict = network('kcla_first').state_dict
    key = next(key for key in state_dict if key.endswith('.norm_d'))
    with pytest.raises(ValueError, match=r'heads have \[16.0, 32.0\] channels'):
        half = {key: state_dict[key][:, ::2]}
        convert_published({**state_dict, **half})


def test_tool_errors_are_one_line(tmp_path):
    good, dst = tmp_path / 'good.pth', tmp_path / 'out.pth'
    torch.save(network('cifar_mla').state_dict, good)
    extra = tmp_path / 'extra.pth'
    torch.save(dict(network('cifar_mla').state_dict, other=torch.zeros(1)), extra)
    code = tmp_path / 'code.pth'
    torch.save(dict(state_dict=Path), code)
    text = tmp_path / 'text.pth'
    text.write_text('no checkpoint')
    numbers = tmp_path / 'numbers.pth'
    torch.save(dict(a=1), numbers)
    mla = ('--arch', 'mla', '--head-dim', '16')
    for args, match in [
        (('nowhere.pth', dst), 'there is no file nowhere.pth'),
        ((good, good), 'good.pth already exists'),
        ((code, dst), 'code.pth holds pathlib'),
        ((text, dst), 'text.pth is not a checkpoint'),
        ((numbers, dst), 'numbers.pth has no state dict'),
        ((extra, dst, *mla), 'extra.pth: 1 keys are unknown .*: other'),
        ((good, dst), 'good.pth: networks of .* set arch'),
        (
            (good, dst, *mla[:2]),
            'good.pth: the checkpoint does not show .* set head_dim',
        ),
        ((good, dst, '--arch', 'kcla'), "unknown for arch='kcla'"),
    ]:
        with pytest.raises(SystemExit, match=f'^error: .*{match}') as error:
            tool(*args)
        assert '\n' not in str(error.value)
        assert not dst.exists()
    with pytest.raises(SystemExit) as error:
        tool(good, dst, '--arch', 'unknown')
    assert error.value.code == 2


CHANGES = dict(
    drop=None,
    rename=None,
    number=lambda x: 1.5,
    text=lambda x: 'x',
    nested=lambda x: {'weight': x},
    scalar=lambda x: x.new_zeros(()),
    empty=lambda x: x.new_zeros(0),
    flat=lambda x: x.flatten(),
    deep=lambda x: x[None],
    twice=lambda x: torch.cat([x, x]) if x.dim() else x.new_zeros(2),
    half=lambda x: x[: len(x) // 2] if x.dim() else x.new_zeros(0),
    wide=lambda x: x.expand(10**6, *x.shape),
    type=lambda x: x.double() if x.dtype == torch.long else x.long(),
)


@pytest.mark.parametrize(
    'name', ['mrla_base', 'cifar_kcla', 'kcla_first', 'cifar_dla_light', 'deit', 'unet']
)
def test_damaged_state_dicts(name):
    """Each change of a tensor is one clear error, or of one that is not needed."""
    if name == 'deit':
        old, kwargs = PublishedDeiT(True, depth=5).state_dict, {}
        make = convert_published
    elif name == 'unet':
        old, kwargs = PublishedUNet().state_dict, dict(target='segmentor')
        make = convert_published
    else:
        old, kwargs = network(name).state_dict, {}
        make = functools.partial(convert, name)
    unneeded = make(old, **kwargs).dropped
    rng = random.Random(0)
    for _ in range(40):
        change, key = rng.choice(list(CHANGES)), rng.choice(list(old))
        state_dict = dict(old)
        value = state_dict.pop(key)
        if change == 'rename':
            state_dict[rng.choice([f'{key}.x', f'x.{key}', key.upper(), ''])] = value
        elif CHANGES[change]:
            state_dict[key] = CHANGES[change](value)
        try:
            make(state_dict, **kwargs)
        except ValueError as error:
            assert len(one_line(error)) < 9000
        else:
            counted = key.endswith('num_batches_tracked')
            counted = counted and change in ('drop', 'scalar')
            flat = change == 'flat' and value.dim() < 2 or 'lambda' in key
            assert counted or flat or key in unneeded, (change, key)


@pytest.mark.parametrize('kind', ['tensor', 'list', 'nested', 'keys', 'wide', 'none'])
def test_tool_on_files_of_other_content(tmp_path, kind):
    old = network('cifar_kcla').state_dict
    content = dict(
        tensor=torch.zeros(3),
        list=[old],
        nested=dict(state_dict=dict(net=old)),
        keys=dict(state_dict={i: value for i, value in enumerate(old.values())}),
        wide=dict(old, **{'conv1.weight': torch.zeros(1).expand(10**5, 3, 3, 3)}),
        none=dict(state_dict=None, model=None),
    )[kind]
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    torch.save(content, src)
    with pytest.raises(SystemExit, match='^error: .*src.pth') as error:
        tool(src, dst)
    assert str(error.value).isprintable() and not dst.exists()


def test_tool_leaves_nothing_half_written(tmp_path, monkeypatch):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    torch.save(network('cifar_kcla').state_dict, src)

    def full(content, file):
        Path(file).write_bytes(b'half')
        raise RuntimeError('PytorchStreamWriter failed writing file')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(
        SystemExit, match='^error: .*dst.pth cannot be .* failed writing'
    ):
        tool(src, dst)
    assert [file.name for file in tmp_path.iterdir()] == ['src.pth']


def test_tool_with_a_file_of_deit(tmp_path, capsys):
    """As DeiT's script writes it, with its arguments; and what differs is said."""
    src, dst = tmp_path / 'deit.pth', tmp_path / 'out.pth'
    arguments = argparse.Namespace(lr=5e-4, model='deit_mrlab_tiny_patch16_224')
    content = dict(model=PublishedDeiT(False).state_dict, epoch=1, args=arguments)
    torch.save(content, src)
    tool(src, dst)
    assert 'note: in training, mmela gives the attention the stochastic depth' in (
        capsys.readouterr().out
    )
    backbone = torch.load(dst, weights_only=True)['meta']['backbone']
    assert backbone['type'] == 'ELAVisionTransformer'


def test_architectures_are_all_tested():
    tested = {arch for arch, *_ in NETWORKS.values()}
    assert set(ARCHS) - tested == {'kcla_unet', 'deit_mrla_base', 'deit_mrla_light'}
