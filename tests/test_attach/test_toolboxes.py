"""Layer attention attached to backbones of the toolboxes and of timm."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmela import attach_layer_attention
from mmela.attach import wiring
from mmela.convert.slim import slim_config, slim_state_dict
from mmela.structure import attention_stages, layer_attentions, prune
from tests.helpers.backbones import BACKBONES, build, build_in, build_plain
from tests.helpers.zoo import ATTENTIONS

SWIN = dict(
    type='SwinTransformer',
    embed_dims=16,
    depths=(2, 2, 2, 2),
    num_heads=(1, 2, 2, 4),
    out_indices=(1, 3),
)


def with_layer_attention(backbone, **kwargs):
    attention = dict(type='MRLABase', **kwargs.pop('layer_attention', {}))
    return dict(
        type='mmela.WithLayerAttention',
        backbone=backbone,
        layer_attention=attention,
        input_size=(64, 64),
        **kwargs,
    )


@pytest.mark.parametrize(
    'scope, name, attention',
    # Widths tell the last two stages of the U-Net's encoder from nothing
    [(*key, 'MRLABase') for key in BACKBONES if key[1] != 'UNetResNet']
    + [('mmpretrain', 'ResNet', kind) for kind in ('MRLALight', 'KCLA')]
    + [('mmpretrain', 'VisionTransformer', 'MRLALight')],
)
def test_finds_what_the_families_say(scope, name, attention, monkeypatch):
    """One watched pass finds the same stages; all else follows from these."""
    expected = build(scope, name, ATTENTIONS[attention])
    plain = build_plain(scope, name)
    monkeypatch.setattr(wiring, 'known_stages', lambda *args: None)
    step = BACKBONES[scope, name].get('layers_per_stage', 4)
    size = (64, 64) if 'img_size' in BACKBONES[scope, name] else (64, 96)
    attach_layer_attention(
        plain, dict(ATTENTIONS[attention]), input_size=size, layers_per_stage=step
    )
    one, other = attention_stages(plain), attention_stages(expected)
    assert list(one) == list(other)
    for mine, theirs in zip(one.values(), other.values()):
        assert list(mine.blocks) == list(theirs.blocks)
        for a, b in zip(mine.attentions, theirs.attentions):
            assert str(a.drop_path) == str(b.drop_path)
            rates = [getattr(x.drop_path, 'drop_prob', 0) for x in (a, b)]
            assert rates[0] == rates[1]
    plain.load_state_dict(expected.state_dict(), strict=True)
    plain.eval()
    expected.eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for out, e in zip(plain(x), expected(x)):
            torch.testing.assert_close(out, e)


def test_finds_the_layers_of_a_vision_transformer():
    plain = build_plain('mmpretrain', 'VisionTransformer')
    attach_layer_attention(plain)
    stages = attention_stages(plain).values()
    names = [f'layers.{i}' for i in range(6)]
    assert [list(stage.blocks) for stage in stages] == [names[:4], names[4:]]
    assert {a.place.features.extra for a in layer_attentions(plain).values()} == {1}


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_swin_in_a_config(scope, tmp_path):
    """Its checkpoint, with_cp, frozen stages and slim config go on to work."""
    swin = dict(SWIN)
    if scope == 'mmpretrain':
        arch = dict(embed_dims=16, depths=SWIN['depths'], num_heads=SWIN['num_heads'])
        swin = dict(type='SwinTransformer', arch=arch, out_indices=(1, 3))
        swin['pad_small_map'] = True
    plain = build_in(scope, swin)
    prefix = 'backbone.' if scope == 'mmdet' else ''
    state = {prefix + key: value for key, value in plain.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'swin.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth'))
    swin = dict(swin, init_cfg=init, frozen_stages=1)
    cfg = with_layer_attention(swin, layer_attention=dict(zero_init=True))
    network = build_in(scope, cfg)
    network.init_weights()
    assert type(network) is type(plain)
    own = {k for k in network.state_dict() if 'layer_attn' not in k}
    assert own == set(plain.state_dict())
    # Frozen stages have none: it would stay zero. In mmpretrain these are two.
    counts = {n: len(s.attentions) for n, s in attention_stages(network).items()}
    kept = ['stages.2.blocks', 'stages.3.blocks']
    if scope != 'mmpretrain':
        kept.insert(0, 'stages.1.blocks')
    assert counts == dict.fromkeys(kept, 2)
    x = torch.randn(2, 3, 64, 64)
    plain.eval()
    network.eval()
    for out, expected in zip(network(x), plain(x)):
        assert torch.equal(out, expected)

    grads = []
    for with_cp in (False, True):
        cfg = with_layer_attention(dict(swin, with_cp=with_cp, drop_path_rate=0.0))
        net = build_in(scope, cfg)
        net.train()
        sum(out.square().mean() for out in net(x)).backward()
        grads.append({n: p.grad for n, p in net.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)

    whole = torch.nn.ModuleDict(dict(backbone=network))
    prune(whole, [list(layer_attentions(whole))[1]])
    state, blocks = slim_state_dict(whole)
    cfg = with_layer_attention(swin, layer_attention=dict(zero_init=True))
    cfg = slim_config(Config(dict(model=dict(backbone=cfg))), blocks)
    text = Config.fromstring(cfg.pretty_text, '.py').model.backbone
    assert text.blocks == blocks['backbone']
    slim = build_in(scope, text)
    slim.load_state_dict({k.partition('.')[2]: v for k, v in state.items()})
    slim.eval()
    for out, expected in zip(slim(x), network(x)):
        assert torch.equal(out, expected)


def test_norm_eval_and_names_of_stages():
    resnet = dict(type='ResNet', depth=18, base_channels=8, frozen_stages=1)
    network = build_in('mmdet', with_layer_attention(dict(resnet, norm_eval=True)))
    network.train()
    assert not network.bn1.training and not network.layer1[0].conv1.weight.requires_grad
    attentions = list(layer_attentions(network).values())
    assert [a.value.weight.requires_grad for a in attentions[:3]] == [
        False,
        False,
        True,
    ]


def test_layer_wise_learning_rates():
    """An attention has the rate of its block; all others have those they had."""
    pytest.importorskip('mmpretrain.models')
    from mmengine.optim import build_optim_wrapper
    from mmpretrain.engine.optimizers import (  # noqa: F401
        LearningRateDecayOptimWrapperConstructor,
    )

    arch = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)
    vit = dict(type='VisionTransformer', arch=arch, img_size=64)
    rates = []
    for cfg in (vit, with_layer_attention(vit)):
        network = build_in('mmpretrain', dict(type='ImageClassifier', backbone=cfg))
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            optim = build_optim_wrapper(
                network,
                dict(
                    optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
                    constructor='LearningRateDecayOptimWrapperConstructor',
                    paramwise_cfg=dict(layer_decay_rate=0.5),
                ),
            )
        names = {id(p): n for n, p in network.named_parameters()}
        rates.append(
            {
                names[id(param)]: group['lr']
                for group in optim.optimizer.param_groups
                for param in group['params']
            }
        )
    plain, attached = rates
    assert {n: lr for n, lr in attached.items() if 'layer_attn' not in n} == plain
    own = {n: lr for n, lr in attached.items() if 'layer_attn' in n}
    assert own and len(set(own.values())) == 4
    for name, rate in own.items():
        assert rate == plain[f'{name.partition(".layer_attn.")[0]}.ln1.weight']


def test_init_cfg_takes_the_place_of_the_backbones():
    """As tools do that load weights afterwards, by ``backbone.init_cfg=None``."""
    init = dict(type='Pretrained', checkpoint='is not there.pth')
    resnet = dict(type='ResNet', depth=18, init_cfg=init)
    cfg = with_layer_attention(resnet)
    assert build_in('mmpretrain', cfg).init_cfg == init
    assert build_in('mmpretrain', dict(cfg, init_cfg=None)).init_cfg is None


def test_bad_backbone():
    with pytest.raises(TypeError, match="needs the config .* got 'ResNet'"):
        build_in('mmpretrain', with_layer_attention('ResNet'))


@pytest.mark.parametrize(
    'name, stages',
    [
        ('test_resnet', [1, 1, 1, 1]),
        ('test_convnext', [1, 2, 4, 2]),
        ('test_vit', [4, 2]),
        ('mobilenetv3_small_050', [1, 4, 2]),
        ('test_nfnet', None),
    ],
)
def test_timm(name, stages):
    """A sample of families, in the tiny variants that timm has for tests."""
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=3).eval()
    network = copy.deepcopy(plain)
    size = plain.pretrained_cfg['input_size'][-2:]
    attach_layer_attention(
        network, dict(type='MRLABase', zero_init=True), input_size=size
    )
    found = [len(stage.blocks) for stage in attention_stages(network).values()]
    assert found == stages or stages is None
    x = torch.randn(2, 3, *size)
    assert torch.equal(network(x), plain(x))


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
def test_backbone_of_timm_in_a_config(scope):
    pytest.importorskip('timm')
    pytest.importorskip('mmpretrain.models')
    # mmdet takes that of mmpretrain
    timm = dict(type='mmpretrain.TIMMBackbone', model_name='test_resnet')
    timm.update(features_only=True, out_indices=(1, 2))
    plain = build_in(scope, timm)
    network = build_in(
        scope, with_layer_attention(timm, layer_attention=dict(zero_init=True))
    )
    own = {k for k in network.state_dict() if 'layer_attn' not in k}
    assert own == set(plain.state_dict())
    network.load_state_dict(plain.state_dict(), strict=False)
    network.eval()
    plain.eval()
    x = torch.randn(2, 3, 64, 64)
    for out, expected in zip(network(x), plain(x)):
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    'scope, backbone, kinds',
    [
        (
            'mmpretrain',
            dict(type='ConvNeXt', arch=dict(depths=[1, 2, 1, 1], channels=[8] * 4)),
            {'ConvNeXtBlock'},
        ),
        (
            'mmpretrain',
            dict(type='RepVGG', arch='A0'),
            {'RepVGGBlock'},
        ),
        ('mmdet', dict(type='CSPDarknet', widen_factor=0.125), {'DarknetBottleneck'}),
        (
            'mmseg',
            dict(type='MixVisionTransformer', embed_dims=8, num_layers=[2] * 4),
            {'TransformerEncoderLayer'},
        ),
        ('mmdet', dict(type='SSDVGG', depth=16, input_size=300), {'Conv2d'}),
    ],
)
def test_families_of_the_toolboxes(scope, backbone, kinds):
    plain = build_in(scope, backbone)
    if backbone['type'] == 'SSDVGG':
        attach_layer_attention(plain, input_size=(300, 300))
    else:
        cfg = with_layer_attention(backbone)
        cfg['layer_attention']['zero_init'] = True
        network = build_in(scope, cfg)
        network.load_state_dict(plain.state_dict(), strict=False)
        plain.eval()
        network.eval()
        x = torch.randn(2, 3, 64, 64)
        for out, expected in zip(network(x), plain(x)):
            assert torch.equal(out, expected)
        plain = network
    stages = attention_stages(plain).values()
    blocks = [block for stage in stages for block in stage.blocks.values()]
    assert {type(block).__name__ for block in blocks} == kinds
