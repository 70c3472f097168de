"""Small backbones of every kind, with every layer attention."""

import copy

import pytest
import torch

from mmela.arguments import arguments_of
from mmela.registry import find_layer_attention
from tests.helpers.zoo import AFTER_BLOCKS

ATTENTIONS = {
    name: AFTER_BLOCKS[name]
    for name in (
        *('MLA', 'MRLABase', 'MRLALight', 'MRLALight-output'),
        *('KCLA', 'KCLA-within', 'AttnRes'),
    )
}
NARROW = dict(depth=50, base_channels=8, head_dim=8)
REGNET = dict(w0=16, wa=16.0, wm=2.0, group_w=8, depth=9, bot_mul=1.0)
MMPRETRAIN = {
    'ELAResNet': dict(NARROW, stem_channels=8, out_indices=(0, 2, 3)),
    'ELAResNetV1d': dict(NARROW, stem_channels=8),
    'ELAResNeXt': dict(NARROW, stem_channels=8, groups=4, width_per_group=16),
    'ELASEResNet': dict(NARROW, stem_channels=8, out_indices=(1, 3)),
    'ELASEResNeXt': dict(NARROW, stem_channels=8, groups=4, width_per_group=16),
    'ELARes2Net': dict(
        NARROW, stem_channels=8, base_width=4, scales=4, out_indices=(1,)
    ),
    'ELARegNet': dict(arch=REGNET, head_dim=8),
    'ELAResNet_CIFAR': dict(NARROW, stem_channels=8),
    'ELABottleneckResNet_CIFAR': dict(
        depth=29, base_channels=8, stem_channels=8, head_dim=8, out_indices=(0, 2)
    ),
    'ELAEfficientNet': dict(
        arch='b1', head_dim=8, out_indices=(3, 6), drop_path_rate=0.2
    ),
    'ELAVisionTransformer': dict(
        arch=dict(embed_dims=32, num_layers=6, num_heads=2, feedforward_channels=64),
        layers_per_stage=3,
        img_size=64,
        out_type='featmap',
        out_indices=[2, 5],
        drop_path_rate=0.1,
        head_dim=16,
    ),
    'ELACeiT': dict(
        arch=dict(embed_dims=32, num_layers=6, num_heads=2, feedforward_channels=64),
        layers_per_stage=3,
        img_size=64,
        drop_path_rate=0.1,
        head_dim=16,
    ),
}
MMDET = {
    'ELAResNet': dict(NARROW, stem_channels=8, out_indices=(0, 2)),
    'ELAResNetV1d': dict(NARROW, stem_channels=8),
    'ELAResNeXt': dict(NARROW, stem_channels=8, groups=4, base_width=16),
    'ELARes2Net': dict(
        NARROW, stem_channels=8, base_width=26, scales=4, norm_eval=False
    ),
    'ELARegNet': dict(arch=REGNET, head_dim=8),
    'ELAPyramidVisionTransformerV2': dict(
        embed_dims=8,
        num_layers=[2, 2, 2, 2],
        drop_path_rate=0.1,
        head_dim=8,
        out_indices=(1, 3),
    ),
}
# Their heads do not divide the channels of the previous stage
NOT_DIVISIBLE = {'ELAEfficientNet', 'ELARegNet', 'ELAPyramidVisionTransformerV2'}


def registry(scope):
    if scope == 'mmdet':
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    return pytest.importorskip(f'{scope}.registry').MODELS


def build(scope, backbone, attention):
    kwargs = dict(MMPRETRAIN if scope == 'mmpretrain' else MMDET)[backbone]
    kwargs = copy.deepcopy(kwargs)
    head_dim = kwargs.pop('head_dim')
    if 'head_dim' in arguments_of(find_layer_attention(attention['type'])):
        attention = dict(attention, head_dim=head_dim)
    if attention['type'] == 'KCLA' and backbone in NOT_DIVISIBLE:
        attention['cross_stage'] = False
    torch.manual_seed(0)
    return registry(scope).build(
        dict(type=backbone, layer_attention=attention, **kwargs)
    )
