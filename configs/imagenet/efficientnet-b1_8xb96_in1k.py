_base_ = './efficientnet-b0_8xb96_in1k.py'

model = dict(backbone=dict(arch='b1'))

train_pipeline = [
    _base_.train_pipeline[0],
    dict(type='EfficientNetRandomCrop', scale=240),
    *_base_.train_pipeline[2:],
]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(type='EfficientNetCenterCrop', crop_size=240),
    _base_.test_pipeline[2],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
