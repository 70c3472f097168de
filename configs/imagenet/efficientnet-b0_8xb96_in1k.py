# Schedule, AutoAugment, stochastic depth, dropout before the classifier and momentum of
# the batch norm (0.99 in TensorFlow's convention) are as in MRLA (appendix B.1).
_base_ = [
    'mmpretrain::_base_/models/efficientnet_b0.py',
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_350e_rmsprop.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        drop_path_rate=0.2, norm_cfg=dict(type='BN', momentum=0.01, eps=1e-3)
    ),
    head=dict(type='DropoutLinearClsHead', dropout=0.2),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='EfficientNetRandomCrop', scale=224),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='AutoAugment', policies='imagenet'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='EfficientNetCenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=96, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=96, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
