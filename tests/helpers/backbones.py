"""Small backbones of every kind, with the attentions that fit each one."""

import copy
import itertools

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

from tests.helpers.zoo import AFTER_BLOCKS, ATTENTIONS

NARROW = dict(depth=18, base_channels=16, stem_channels=16)
BOTTLENECKS = dict(depth=50, base_channels=8, stem_channels=8)
GROUPS = dict(BOTTLENECKS, groups=4)
REGNET = dict(arch=dict(w0=16, wa=16.0, wm=2.0, group_w=8, depth=7, bot_mul=1.0))
TRANSFORMER = dict(
    arch=dict(embed_dims=32, num_layers=6, num_heads=2, feedforward_channels=64),
    img_size=64,
    drop_path_rate=0.1,
    layers_per_stage=4,
)
RESNETS = {
    ('mmdet', 'ResNet'): dict(NARROW, norm_eval=False, out_indices=(0, 2)),
    ('mmdet', 'ResNetV1d'): dict(NARROW, norm_eval=False),
    ('mmdet', 'ResNeXt'): dict(GROUPS, base_width=16, norm_eval=False),
    ('mmdet', 'Res2Net'): dict(BOTTLENECKS, base_width=26, scales=4, norm_eval=False),
    ('mmdet', 'RegNet'): dict(REGNET, norm_eval=False),
    ('mmpretrain', 'ResNet'): dict(NARROW, drop_path_rate=0.3, out_indices=(0, 2, 3)),
    ('mmpretrain', 'ResNetV1d'): dict(NARROW, drop_path_rate=0.3),
    ('mmpretrain', 'ResNeXt'): dict(GROUPS, width_per_group=16),
    ('mmpretrain', 'SEResNet'): dict(BOTTLENECKS, out_indices=(1, 3)),
    ('mmpretrain', 'SEResNeXt'): dict(GROUPS, width_per_group=16),
    ('mmpretrain', 'Res2Net'): dict(
        BOTTLENECKS, base_width=4, scales=4, out_indices=(1,)
    ),
    ('mmpretrain', 'RegNet'): REGNET,
    ('mmpretrain', 'ResNet_CIFAR'): dict(NARROW, drop_path_rate=0.3),
    ('mmpretrain', 'BottleneckResNet_CIFAR'): dict(
        depth=29, base_channels=8, stem_channels=8, out_indices=(0, 2)
    ),
    ('mmseg', 'ResNet'): dict(NARROW, norm_eval=False),
    ('mmseg', 'ResNetV1c'): dict(NARROW, norm_eval=False),
    ('mmseg', 'UNetResNet'): dict(depth=18, stage_channels=(8, 16, 24, 24)),
}
OTHERS = {
    ('mmdet', 'PyramidVisionTransformerV2'): dict(
        embed_dims=8, num_layers=[2, 2, 2, 2], drop_path_rate=0.1, out_indices=(1, 3)
    ),
    ('mmpretrain', 'EfficientNet'): dict(
        arch='b0', drop_path_rate=0.2, out_indices=(3, 6)
    ),
    ('mmpretrain', 'VisionTransformer'): dict(
        TRANSFORMER, layers_per_stage=3, out_type='featmap', out_indices=[2, 5]
    ),
    ('mmpretrain', 'CeiT'): TRANSFORMER,
}
BACKBONES = {**RESNETS, **OTHERS}
# Attentions for ResNet blocks that also fit another network
ALSO_FITTING = [('EfficientNet', 'DIA'), ('EfficientNet', 'Plugin')]
# AA cannot replace their grouped 3x3 convolutions
GROUPED = ('ResNeXt', 'SEResNeXt', 'Res2Net', 'RegNet')
FITTING = [
    pytest.param(*key, name, id=f'{key[0]}-{key[1]}-{name}')
    for key, name in itertools.product(BACKBONES, ATTENTIONS)
    if (key in RESNETS and not (name == 'AA' and key[1] in GROUPED))
    or name in AFTER_BLOCKS
    or (key[1], name) in ALSO_FITTING
]


def build_in(scope, cfg):
    """Build a config in a toolbox's registry, always with the same weights."""
    if scope != 'mmpretrain':
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    pytest.importorskip(f'{scope}.models')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(ConfigDict(copy.deepcopy(cfg)))


def build_plain(scope, name, **kwargs):
    """Build a backbone of the table without attention."""
    cfg = dict(BACKBONES[scope, name], type=name, **kwargs)
    cfg.pop('layers_per_stage', None)
    return build_in(scope, cfg)


def build(scope, name, attention, **kwargs):
    """Build ``ELA<X>`` of a backbone of the table."""
    cfg = dict(BACKBONES[scope, name], type=f'ELA{name}', layer_attention=attention)
    return build_in(scope, dict(cfg, **kwargs))
