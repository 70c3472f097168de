"""Small networks on disk: config and checkpoint."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmela.structure import prune

BACKBONE = dict(
    type='ELAResNet',
    depth=18,
    base_channels=8,
    layer_attention=dict(type='MRLABase', head_dim=8),
)


def needs_grad_cam():
    # Optional: pip install grad-cam==1.5.5
    pytest.importorskip('pytorch_grad_cam', exc_type=ImportError)


def save(folder, name, model, pruned=()):
    """Write a config and a random checkpoint of its model."""
    cfg = Config(dict(model))
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        torch.manual_seed(0)
        network = registry.build(cfg.model)
    cfg.dump(folder / f'{name}.py')
    torch.save(dict(meta={}, state_dict=network.state_dict()), folder / f'{name}.pth')
    if pruned:
        prune(network, pruned)
        torch.save(network.state_dict(), folder / f'{name}_pruned.pth')
    return folder / f'{name}.py', folder / f'{name}.pth'


def classifier(**kwargs):
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(40, 32)),
        dict(type='PackInputs'),
    ]
    return dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=dict(BACKBONE, stem_channels=8, **kwargs),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=4, in_channels=64),
            data_preprocessor=dict(mean=[127.5] * 3, std=[50.0] * 3),
        ),
        test_dataloader=dict(dataset=dict(pipeline=pipeline)),
    )


def transformer(head='VisionTransformerClsHead', **kwargs):
    """MMPretrain's vision transformer with 4x4 patches by default, in eval mode."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    arch = dict(embed_dims=12, num_layers=2, num_heads=3, feedforward_channels=16)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                dict(type='VisionTransformer', arch=arch, img_size=32, patch_size=8),
                **kwargs,
            ),
            head=head and dict(type=head, num_classes=5, in_channels=12),
            data_preprocessor=dict(mean=[127.5] * 3, std=[50.0] * 3),
        )
    )
    return model.eval()
