# Fine-tuning at 384 pixels; set `load_from` to the checkpoint of the network for 224.
# MRLA gives no recipe, so this is DeiT's: 30 epochs with lr 5e-6 for a batch of 512 and
# weight decay 1e-8.
_base_ = './ceit-tiny_8xb128_in1k.py'

model = dict(backbone=dict(img_size=384))

train_pipeline = [
    dict(step, scale=384) if 'scale' in step else step for step in _base_.train_pipeline
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(384, 384), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=5e-6, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)
