"""Checkpoints of mmela 0.1 still load, and give the same outputs."""

import io
import lzma
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

import mmela  # noqa: F401
from mmela.layers import LayerAttention
from mmela.structure import attention_stages

SAVED = Path(__file__).parents[1] / 'data' / 'networks_0.1.pth.xz'
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


@pytest.fixture(scope='module')
def saved():
    with lzma.open(SAVED) as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


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
