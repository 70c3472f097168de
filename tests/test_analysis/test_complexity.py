"""FLOPs and parameters before and after pruning, counted by hand."""

import json

import pytest
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmela.analysis.complexity import (
    backbone_complexity,
    count_flops,
    input_size,
    kept_memory,
    used_parameters,
)
from mmela.analysis.work_dir import Run
from mmela.pruning import LayerDecision, PruningDecision
from mmela.structure import prune
from tests.helpers.work_dirs import write_decisions

pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

BACKBONE = dict(
    type='ELAResNet',
    depth=18,
    base_channels=8,
    layer_attention=dict(type='MRLABase', head_dim=8),
)
# One attention of the first stage at 64 x 64 pixels: 8 channels of 16 x 16
CHANNELS, PIXELS = 8, 16 * 16
# Value and normalisation, a shift and a scale; query and key, kernels of 3
FLOPS = (9 + 2) * CHANNELS * PIXELS + 2 * 3 * CHANNELS
PARAMETERS = (9 + 2) * CHANNELS + 2 * 3


@pytest.fixture
def backbone():
    with MODELS.switch_scope_and_registry('mmdet') as registry:
        model = registry.build(dict(BACKBONE))
    model.eval()
    return model


def test_one_attention(backbone):
    flops = count_flops(backbone, (64, 64))
    parameters = used_parameters(backbone)
    assert parameters == sum(p.numel() for p in backbone.parameters())
    prune(backbone, ['layer1.1.layer_attn'])
    assert flops - count_flops(backbone, (64, 64)) == FLOPS
    assert parameters - used_parameters(backbone) == PARAMETERS


def test_products(backbone):
    """The second attention of a stage sums two values by two scores a head."""
    flops = count_flops(backbone, (64, 64), products=True)
    prune(backbone, ['layer1.1.layer_attn'])
    saved = flops - count_flops(backbone, (64, 64), products=True)
    assert saved == FLOPS + 2 * CHANNELS * PIXELS + 2 * CHANNELS


class SelfAttention(nn.Module):
    """Five queries and keys of four channels in two heads, and one product."""

    def forward(self, x):
        tokens = x[:, :1, 0, :40].reshape(1, 2, 5, 4)
        keys = x[:, :1, 0, :56].reshape(1, 2, 7, 4)
        return F.scaled_dot_product_attention(tokens, keys, keys) * tokens


def test_self_attention():
    network = SelfAttention()
    assert count_flops(network, (1, 64)) == 0
    assert count_flops(network, (1, 64), products=True) == 2 * 2 * 5 * 7 * 4 + 40


def test_kept_memory():
    """The output of the ReLU is kept once, and neither images nor weights are."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    floats = 4 * 6 * 5
    assert kept_memory(network, (6, 5)) == 4 * floats
    # And the input of the norm, with its mean and deviation over two images
    network.insert(1, nn.BatchNorm2d(4))
    assert kept_memory(network, (6, 5)) == 4 * (2 * floats + 2 * 4 / 2)
    for module in (network[0], network[1]):  # as in a frozen stem
        module.requires_grad_(False)
    assert kept_memory(network, (6, 5)) == 4 * floats
    assert not network.training


def make_run(path, config, decisions=()):
    log = path / '20260102_030405' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps(dict(loss=1.0, epoch=1, iter=1, step=1)))
    (path / 'config.py').write_text(config)
    if decisions:
        write_decisions(path, decisions)
    return Run(path)


def config(**kwargs):
    step = dict(type='Resize', scale=(96, 64), keep_ratio=True)
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(type='FasterRCNN', backbone=BACKBONE),
            test_dataloader=dict(dataset=dict(pipeline=[step])),
            **kwargs,
        )
    ).pretty_text


def test_run(tmp_path, backbone):
    names = [f'backbone.layer{s}.{b}.layer_attn' for s in range(1, 5) for b in range(2)]
    # This run began with one attention pruned already, and pruned another.
    gone = 'backbone.layer1.1.layer_attn'
    left = tuple(
        LayerDecision(name, name[: len('backbone.layer1')], pruned=name == gone)
        for name in names
        if 'layer3.1' not in name
    )
    decision = PruningDecision(
        left, dict(type='EBQM'), window=(1, 1), unit='epoch', iteration=5
    )
    run = make_run(tmp_path, config(), [decision])
    costs, size, reason = backbone_complexity(run)
    assert size == (64, 96) and not reason
    assert [c.label for c in costs] == ['before pruning', 'after epoch 1']
    assert [c.active for c in costs] == [7, 6]
    assert costs[0].parameters - costs[1].parameters == PARAMETERS
    # One and a half times as many pixels
    assert (
        costs[0].flops - costs[1].flops == 1.5 * 11 * CHANNELS * PIXELS + 6 * CHANNELS
    )
    prune(backbone, ['layer3.1.layer_attn'])
    assert costs[0].flops == count_flops(backbone, size)


@pytest.mark.parametrize(
    'text, reason',
    [
        ('x = 1', 'no model.backbone'),
        ('no python (', 'does not run'),
        ("model = dict(backbone=dict(type='Unheard'))", 'Unheard'),
    ],
)
def test_not_to_be_counted(tmp_path, text, reason):
    costs, size, found = backbone_complexity(make_run(tmp_path, text))
    assert costs == [] and size is None and reason in found
    assert '\n' not in found


@pytest.mark.parametrize(
    'steps, size',
    [
        ([dict(type='Resize', scale=(1333, 800))], (800, 1333)),
        ([dict(type='mmdet.Resize', scale=320)], (320, 320)),
        (
            [
                dict(type='ResizeEdge', scale=256),
                dict(type='CenterCrop', crop_size=224),
            ],
            (224, 224),
        ),
        ([dict(type='PackInputs')], (224, 224)),
    ],
)
def test_input_size(steps, size):
    dataset = dict(type='CustomDataset', pipeline=steps)
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    assert input_size(cfg) == size
    wrapped = dict(type='RepeatDataset', dataset=dataset)
    assert input_size(Config(dict(val_dataloader=dict(dataset=wrapped)))) == size


def test_input_size_without_pipeline():
    cifar = dict(dataset=dict(type='CIFAR100', pipeline=[]))
    assert input_size(Config(dict(test_dataloader=cifar))) == (32, 32)
    assert input_size(Config({})) == (224, 224)
    steps = [dict(type='Resize', scale=64)]
    assert input_size(Config(dict(test_pipeline=steps))) == (64, 64)
