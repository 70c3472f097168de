# The demo's detector on images of 128 pixels, without attention.
_base_ = '../../demo/faster-rcnn_r50-narrow_ela_fpn_shapes.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        base_channels=16,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        style='pytorch',
        init_cfg=None,
    ),
    # Objects are two thirds as large as at 192 pixels.
    rpn_head=dict(anchor_generator=dict(scales=[8 / 3])),
    roi_head=dict(bbox_roi_extractor=dict(finest_scale=19)),
)

# More test images than in the demo, because differences on few images are noise.
data_root = 'data/shapes-study/'
train_pipeline = [
    dict(step, scale=(128, 128)) if step['type'] == 'Resize' else step
    for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, scale=(128, 128)) if step['type'] == 'Resize' else step
    for step in _base_.test_pipeline
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

# Like the demo, but with one learning rate for all parameters
optim_wrapper = dict(
    _delete_=True,
    _scope_='mmdet',
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)

train_cfg = dict(val_interval=12)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
custom_hooks = [dict(type='MemoryFormatHook')]
