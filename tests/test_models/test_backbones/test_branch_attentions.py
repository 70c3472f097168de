"""Attentions within the blocks on the backbones of the toolboxes."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmela.layers import LayerAttention
from mmela.structure import attention_stages
from tests.helpers.backbones import build, registry

FRAGMENTS = Path(__file__).resolve().parents[3] / 'configs/_base_/attentions'
ATTENTIONS = {
    'Plugin': dict(plugin=dict(type='SqueezeExcitation', reduction=4)),
    'DIA': dict(),
    'BA': dict(reduction=4),
    'RLAg': dict(hidden=4),
    'DLALight': dict(reduction=4),
    'DLABase': dict(reduction=4),
}


def make(scope, backbone, name):
    attention = dict(type=name, **ATTENTIONS[name])
    return build(scope, backbone, attention)


@pytest.mark.parametrize('name', ATTENTIONS)
@pytest.mark.parametrize(
    'scope, backbone',
    [
        ('mmpretrain', 'ELAResNet'),
        ('mmpretrain', 'ELASEResNet'),
        ('mmpretrain', 'ELAResNet_CIFAR'),
        ('mmpretrain', 'ELABottleneckResNet_CIFAR'),
        ('mmdet', 'ELAResNet'),
        ('mmdet', 'ELARes2Net'),
        ('mmdet', 'ELARegNet'),
    ],
)
def test_training_step(scope, backbone, name):
    net = make(scope, backbone, name)
    net.train()
    outs = net(torch.randn(2, 3, 64, 64))
    sum(out.square().mean() for out in outs).backward()
    # No output depends on later stages.
    for stage in [*attention_stages(net).values()][: max(net.out_indices) + 1]:
        assert stage.attentions
        for param in (p for a in stage.attentions for p in a.parameters()):
            # With one block nothing was stored that could be retrieved.
            if param.grad is None:
                assert name == 'DLABase' and len(stage.attentions) == 1
            else:
                assert torch.isfinite(param.grad).all()


@pytest.mark.parametrize('name', ['Plugin', 'DIA'])
def test_efficientnet(name):
    net = make('mmpretrain', 'ELAEfficientNet', name)
    net.eval()  # which returns None
    x = torch.randn(1, 3, 64, 64)
    before = [out.clone() for out in net(x)]
    for module in net.modules():
        if isinstance(module, LayerAttention):
            module.attention_state = 2
    # Random weights make the features small.
    change = (net(x)[-1] - before[-1]).abs().max()
    assert change > 1e-3 * before[-1].abs().max()


@pytest.mark.parametrize('name', ['Plugin', 'DIA', 'BA', 'RLAg'])
@pytest.mark.parametrize(
    'scope, backbone',
    [
        ('mmpretrain', 'ELAVisionTransformer'),
        ('mmpretrain', 'ELACeiT'),
        ('mmdet', 'ELAPyramidVisionTransformerV2'),
    ],
)
def test_transformers_have_no_branch(scope, backbone, name):
    with pytest.raises(ValueError, match=rf'{name} works on .* layers\..* returns BLC'):
        make(scope, backbone, name)


# KCLA, table I, and ELA, table 1: with 10 and with 100 classes
PRINTED = {
    ('se', 20): (0.24, 0.27),
    ('se', 56): (0.66, 0.68),
    ('cbam', 20): (0.24, 0.27),
    ('bam', 20): (0.27, 0.29),
    ('bam', 56): (0.73, 0.75),
    ('dia', 20): (0.44, 0.46),
    ('dia', 56): (0.81, 0.83),
    ('dla-light', 20): (0.41, 0.43),
    ('dla-light', 56): (0.80, 0.82),
}


@pytest.mark.parametrize('name, depth', PRINTED)
def test_parameters_of_the_papers(name, depth):
    if name == 'cbam':
        pytest.importorskip('timm')
    backbone = Config.fromfile(FRAGMENTS / f'{name}_cifar.py').backbone
    net = registry('mmpretrain').build(dict(backbone, depth=depth))
    count = sum(p.numel() for p in net.parameters())
    for classes, printed in zip((10, 100), PRINTED[name, depth]):
        assert (count + 257 * classes) / 1e6 == pytest.approx(printed, abs=0.0101)
