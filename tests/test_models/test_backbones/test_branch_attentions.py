"""Attentions within the blocks on the backbones of the toolboxes."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmela.layers import LayerAttention
from tests.helpers.backbones import build, build_in
from tests.helpers.zoo import ATTENTIONS

FRAGMENTS = Path(__file__).resolve().parents[3] / 'configs/_base_/attentions'


@pytest.mark.parametrize('name', ['Plugin', 'DIA'])
def test_efficientnet(name):
    net = build('mmpretrain', 'EfficientNet', ATTENTIONS[name])
    net.eval()  # which returns None
    x = torch.randn(1, 3, 64, 64)
    before = [out.clone() for out in net(x)]
    for module in net.modules():
        if isinstance(module, LayerAttention):
            module.attention_state = 2
    # Random weights make the features small.
    change = (net(x)[-1] - before[-1]).abs().max()
    assert change > 1e-3 * before[-1].abs().max()


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
    net = build_in('mmpretrain', dict(backbone, depth=depth))
    count = sum(p.numel() for p in net.parameters())
    for classes, printed in zip((10, 100), PRINTED[name, depth]):
        assert (count + 257 * classes) / 1e6 == pytest.approx(printed, abs=0.0101)
