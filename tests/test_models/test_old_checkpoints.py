"""Checkpoints of earlier versions still load, and give the same outputs."""

import copy
import io
import lzma
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn

import mmela  # noqa: F401
from mmela.layers import LayerAttention
from mmela.structure import attention_stages, layer_attentions

DATA = Path(__file__).parents[1] / 'data'
SAVED = DATA / 'networks_0.1.pth.xz'
# Of 0.2 before attentions became submodules of their blocks. To keep the file small,
# weights are drawn from the names that they had then.
SAVED_DEV = DATA / 'networks_0.2dev.pth.xz'
NAMES = (
    'mrla_base',
    'mla',
    'mrla_light',
    'mrla_light_output',
    'kcla',
    'tokens',
    'tokens_light',
    'zero_init',
    'frozen',
)
DEV_NAMES = (
    'ela_resnet_mrla_base',
    'ela_resnet_kcla',
    'ela_resnet_dla_light',
    'ela_resnet_dla_base',
    'ela_resnet_dia',
    'ela_resnet_ba',
    'ela_resnet_rla_g',
    'ela_resnet_aa',
    'ela_resnet_se',
    'ela_resnet_light_slim',
    'ela_efficientnet',
    'ela_vit',
    'ela_vit_linear',
    'ela_ceit',
    'ela_pvt',
    'with_resnet',
    'with_resnet_light',
    'with_resnet_kcla',
    'with_vit',
    'with_swin',
    'with_swin_slim',
    'with_csp',
    'with_kcla_slim',
)


def read(path):
    with lzma.open(path) as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


@pytest.fixture(scope='module')
def saved():
    return read(SAVED)


@pytest.fixture(scope='module')
def saved_dev():
    return read(SAVED_DEV)


def build(cfg):
    scope = cfg['type'].split('.')[0]
    pytest.importorskip(f'{scope}.models', exc_type=ImportError)
    with warnings.catch_warnings():  # names that are deprecated since
        warnings.simplefilter('ignore', DeprecationWarning)
        return MODELS.build(cfg)


@pytest.mark.parametrize('name', NAMES)
def test_same_outputs(saved, name):
    network = saved['networks'][name]
    model = build(network['cfg'])
    model.load_state_dict(network['state_dict'], strict=True)
    assert sum(not m.active for m in model.modules() if isinstance(m, LayerAttention))
    model.eval()
    with torch.no_grad():
        for out, expected in zip(model(saved['input']), network['outputs']):
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_frozen_stage_with_zero_init_has_no_attention_any_more(saved):
    network = saved['networks']['zero_init']
    model = build(network['cfg'])
    stages = attention_stages(model)
    assert {name: len(stage.attentions) for name, stage in stages.items()} == {
        f'layer{i}': 2 for i in (2, 3, 4)
    }
    state = dict(network['state_dict'])
    state['layer1.1.layer_attn.norm.weight'] = torch.ones(4)
    with pytest.raises(RuntimeError, match='trained layer attention at layer1.1'):
        model.load_state_dict(state, strict=False)
    # Where it is asked for by name, it is there.
    cfg = dict(network['cfg'], attention_blocks=[[0, 1]] * 4)
    build(cfg).load_state_dict(state, strict=True)


def draw(key, shape):
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    x = torch.randn(shape, generator=generator) * 0.1
    if key.endswith('running_var'):
        return x.abs() + 0.5
    return x if len(shape) != 1 or key.endswith('running_mean') else x + 0.7


def dev_state(network):
    return {
        **{key: draw(key, shape) for key, shape in network['drawn'].items()},
        **network['fixed'],
        **dict.fromkeys(network['zeros'], torch.tensor(0)),
    }


def build_dev(cfg):
    scope = cfg.get('backbone', cfg)['type'].split('.')[0]
    pytest.importorskip(f'{scope}.models', exc_type=ImportError)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(copy.deepcopy(cfg))


def check_outputs(model, saved_dev, name):
    network = saved_dev['networks'][name]
    model.eval()
    size = network['size']
    with torch.no_grad():
        outputs = model(saved_dev['input'][..., :size, :size])
    assert len(outputs) == len(network['outputs'])
    for out, expected in zip(outputs, network['outputs']):
        scale = float(expected.abs().max())
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize('name', DEV_NAMES)
def test_networks_of_the_development_version(saved_dev, name, tmp_path):
    network = saved_dev['networks'][name]
    state, model = dev_state(network), build_dev(network['cfg'])
    model.load_state_dict(dict(state), strict=True)
    check_outputs(model, saved_dev, name)
    attentions = layer_attentions(model).values()
    states = [int(v) for k, v in state.items() if k.endswith('layer_attn.state')]
    assert [int(a.attention_state) for a in attentions] == states
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(network['trained'])
    # As a part of a larger network, by mmengine's loader
    other = nn.ModuleDict(dict(backbone=build_dev(network['cfg'])))
    for param in other.parameters():
        nn.init.constant_(param, float('nan'))
    whole = {f'backbone.{key}': value for key, value in state.items()}
    torch.save(whole, tmp_path / 'old.pth')
    load_checkpoint(other, str(tmp_path / 'old.pth'), strict=True)
    check_outputs(other['backbone'], saved_dev, name)
    # and what is saved now has today's keys alone
    again = build_dev(network['cfg'])
    again.load_state_dict(model.state_dict(), strict=True)
    check_outputs(again, saved_dev, name)
    assert not [key for key in model.state_dict() if 'layer_attn_stages' in key]


@pytest.mark.parametrize(
    'checkpoint, network',
    [
        ('with_resnet', 'ela_resnet_mrla_base'),
        ('ela_resnet_mrla_base', 'with_resnet'),
        ('with_resnet_kcla', 'ela_resnet_kcla'),
        ('with_vit', 'ela_vit'),
        ('ela_vit', 'with_vit'),
    ],
)
def test_checkpoint_of_the_other_way(saved_dev, checkpoint, network):
    """Both ways to give attention had keys of their own; now they have the same."""
    networks = saved_dev['networks']
    state, model = dev_state(networks[checkpoint]), build_dev(networks[network]['cfg'])
    model.load_state_dict(state, strict=True)
    check_outputs(model, saved_dev, checkpoint)


def test_unknown_block_of_an_old_key(saved_dev):
    network = saved_dev['networks']['with_vit']
    state, model = dev_state(network), build_dev(network['cfg'])
    key = 'layer_attn_stages.0.layers-0.layer_attn.state'
    state[key.replace('layers-0', 'layers-7')] = state.pop(key)
    with pytest.raises(RuntimeError, match='layer_attn_stages|layers.0.layer_attn'):
        model.load_state_dict(state, strict=True)
