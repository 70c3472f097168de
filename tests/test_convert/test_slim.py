"""Networks without their pruned attentions."""

import runpy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict

from mmela.convert.slim import slim_config, slim_state_dict
from mmela.hooks import LayerAttentionPruningHook
from mmela.layers import AttentionState
from mmela.structure import layer_attentions, prune

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'convert' / 'slim.py'


def tool(*args):
    runpy.run_path(str(TOOL))['main'](list(map(str, args)))


@pytest.fixture(scope='module')
def registry():
    return pytest.importorskip('mmpretrain.registry').MODELS


@pytest.mark.parametrize('name', ['ela', 'kcla'])
def test_shipped_config_of_three_stages(tmp_path, config_dir, registry, name, capsys):
    config = config_dir / 'cifar' / f'resnet20-{name}_1xb128_cifar10.py'
    cfg = Config.fromfile(config)
    model = registry.build(cfg.model)
    prune(model, [f'backbone.layer{stage}.1.layer_attn' for stage in (1, 3)])
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'x.pth')
    tool(config, tmp_path / 'x.pth', tmp_path / 'slim.pth', '--size', 32)
    slim_cfg = Config.fromfile(tmp_path / 'slim.py')
    assert slim_cfg.model.backbone.blocks == [
        ['layer1.0', '!layer1.1'],
        ['layer2.0', 'layer2.1'],
        ['layer3.0', '!layer3.1'],
    ]
    slim = registry.build(slim_cfg.model)
    slim.load_state_dict(torch.load(tmp_path / 'slim.pth')['state_dict'], strict=True)
    assert 'differ by 0' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='has no layer attention'):
        plain = config_dir / 'cifar' / 'resnet20_1xb128_cifar10.py'
        model = registry.build(Config.fromfile(plain).model)
        torch.save(model.state_dict(), tmp_path / 'plain.pth')
        tool(plain, tmp_path / 'plain.pth', tmp_path / 'out.pth')


@pytest.mark.parametrize(
    'backbone, pruned',
    [
        (dict(type='ELAResNet', depth=18), names)
        for names in (
            ['layer2.0'],
            ['layer2.0', 'layer2.1'],
            ['layer1.0', 'layer1.1', 'layer2.0'],
            ['layer3.0', 'layer4.0', 'layer4.1'],
        )
    ]
    + [
        (
            dict(type='ELAVisionTransformer', arch='deit-tiny', img_size=64),
            ['layers.4', 'layers.9'],
        )
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else '-'.join(value),
)
def test_kcla_takes_nothing_over_without_its_first_attention(
    registry, backbone, pruned
):
    """Only the first attention of a stage takes over the memory of another."""
    cfg = dict(backbone, layer_attention=dict(type='KCLA', head_dim=16))
    torch.manual_seed(0)
    model = registry.build(cfg)
    for name in pruned:
        attention = model.get_submodule(f'{name}.layer_attn')
        attention.attention_state = AttentionState.PRUNED
    model.eval()
    state_dict, blocks = slim_state_dict(model)
    slim = registry.build(dict(cfg, blocks=blocks['']))
    slim.load_state_dict(state_dict, strict=True)
    slim.eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for out, expected in zip(slim(x), model(x)):
            assert torch.equal(out, expected)


class OwnHook(LayerAttentionPruningHook):
    pass


def test_the_hook_is_left_out_by_name_and_by_class():
    kept = dict(type='EMAHook'), dict(type=torch.nn.Identity)
    hooks = [
        dict(type='LayerAttentionPruningHook', windows=[(1, 2)]),
        dict(type='mmela.LayerAttentionPruningHook', windows=[(1, 2)]),
        dict(type=LayerAttentionPruningHook, windows=[(1, 2)]),
        dict(type=OwnHook, windows=[(1, 2)]),
    ]
    cfg = Config(
        dict(
            model=dict(backbone=dict(type='ELAResNet')),
            custom_hooks=[kept[0], *hooks, kept[1]],
            default_hooks=dict(pruning=hooks[2], timer=dict(type='IterTimerHook')),
        )
    )
    slim = slim_config(cfg, dict(backbone=[[0]]))
    assert slim.custom_hooks == list(kept)
    assert slim.default_hooks == dict(pruning=None, timer=dict(type='IterTimerHook'))
    assert len(cfg.custom_hooks) == 6  # the caller's stays as it is
    assert slim_config(Config(dict(model=cfg.model)), {}).custom_hooks == []


def test_slim_config_leaves_the_run_behind():
    """Paths of the machine that trained, which would be asked for elsewhere."""
    run = dict(load_from='/home/ann/start.pth', resume=True, work_dir='/home/ann/w')
    start = dict(type='Pretrained', checkpoint='/home/ann/resnet.pth')
    model = dict(type='A', parts=[dict(type='B', init_cfg=start)])
    cfg = slim_config(Config(dict(model=model, a=1, **run)), {})
    model = dict(type='A', parts=[dict(type='B', init_cfg=None)])
    assert cfg.to_dict() == dict(model=model, a=1, custom_hooks=[])


def test_hook_in_a_config_of_the_new_style(tmp_path, registry):
    """There a type is a class, which mmengine imports late."""
    config = tmp_path / 'config.py'
    config.write_text(
        'from mmpretrain.models import ImageClassifier, LinearClsHead\n'
        'from mmela.models.backbones.mmpretrain_backbones import ELAResNet\n'
        'from mmela.hooks import LayerAttentionPruningHook\n'
        "default_scope = 'mmpretrain'\n"
        'model = dict(type=ImageClassifier,\n'
        '    backbone=dict(type=ELAResNet, depth=18),\n'
        '    head=dict(type=LinearClsHead, in_channels=512, num_classes=2))\n'
        'custom_hooks = [dict(type=LayerAttentionPruningHook, windows=[(1, 2)])]\n'
    )
    cfg = Config.fromfile(config)
    assert isinstance(cfg.custom_hooks[0], ConfigDict)
    model = registry.build(cfg.model)
    prune(model, ['backbone.layer2.1.layer_attn'])
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    tool(config, tmp_path / 'x.pth', tmp_path / 'slim.pth', '--size', 64)
    slim_cfg = Config.fromfile(tmp_path / 'slim.py')
    assert slim_cfg.custom_hooks == []
    slim = registry.build(slim_cfg.model)
    slim.load_state_dict(torch.load(tmp_path / 'slim.pth')['state_dict'])
    assert list(layer_attentions(slim.backbone))[2:4] == [
        'layer2.0.layer_attn',
        'layer3.0.layer_attn',
    ]


def test_backbone_in_a_list(tmp_path, registry):
    """As in retrievers of MMPretrain, whose encoder is a list of modules."""
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='ImageToImageRetriever', prototype='none', image_encoder=[\n"
        "    dict(type='mmela.WithLayerAttention',\n"
        "        backbone=dict(type='mmpretrain.ResNet', depth=18),\n"
        "        layer_attention=dict(type='MRLABase')),\n"
        "    dict(type='GlobalAveragePooling')])\n"
        "custom_imports = dict(imports=['mmela'])\n"
    )
    model = registry.build(Config.fromfile(config).model)
    prune(model, ['image_encoder.0.layer3.1'])
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    tool(config, tmp_path / 'x.pth', tmp_path / 'slim.pth', '--size', 64)
    slim_cfg = Config.fromfile(tmp_path / 'slim.py')
    slim = registry.build(slim_cfg.model)
    slim.load_state_dict(torch.load(tmp_path / 'slim.pth')['state_dict'])
    gone = {'image_encoder.0.layer3.1.layer_attn'}
    assert set(layer_attentions(model)) - set(layer_attentions(slim)) == gone


def test_config_without_the_backbone():
    with pytest.raises(
        ValueError, match="backbone at 'student.backbone', but its config"
    ):
        slim_config(Config(dict(model=dict(x=1))), {'student.backbone': [[0]]})
