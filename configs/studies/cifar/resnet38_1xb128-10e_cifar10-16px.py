# A tenth of CIFAR-10 at 16 x 16 pixels, with a network of four blocks per stage. Ten
# epochs take two to five minutes on one core.
_base_ = '../../cifar/resnet20_1xb128-10e_cifar10-folder.py'

model = dict(backbone=dict(depth=38))

data_root = 'data/cifar10_folder-500'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=16, interpolation='area', backend='cv2'),
    dict(type='RandomCrop', crop_size=16, padding=2),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=16, interpolation='area', backend='cv2'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
val_dataloader = dict(
    num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline)
)
test_dataloader = val_dataloader

train_cfg = dict(val_interval=10)
default_hooks = dict(logger=dict(interval=10))
custom_hooks = [dict(type='MemoryFormatHook')]
