# A region proposal network that finds objects of any class in 128 images of COCO: 96
# for training, and every fourth one for testing. So few images are not enough to learn
# classes. It starts from the detector of the shapes.
_base_ = '../../demo/faster-rcnn_r50-narrow_ela_fpn_shapes.py'
runner_type = 'Runner'

detector = _base_.model
model = dict(
    _delete_=True,
    type='RPN',
    data_preprocessor=detector.data_preprocessor,
    backbone=dict(
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
    neck=detector.neck,
    rpn_head=detector.rpn_head,
    train_cfg=dict(rpn=detector.train_cfg.rpn),
    test_cfg=dict(rpn=detector.test_cfg.rpn),
)
del detector

data_root = 'data/coco128/'
images = dict(
    type='CocoDataset',
    data_root=data_root,
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='RandomResize',
        scale=(192, 192),
        ratio_range=(0.8, 1.25),
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 192), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'instances',  # the evaluator reads the ground truth from here
        ),
    ),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',
        times=2,
        dataset=dict(
            images,
            # Both sets have the same images, so none is skipped
            filter_cfg=dict(filter_empty_gt=False, min_size=0),
            indices=[i for i in range(128) if i % 4],
            pipeline=train_pipeline,
        ),
    )
)
val_dataloader = dict(
    dataset=dict(
        images,
        _delete_=True,
        test_mode=True,
        indices=[*range(0, 128, 4)],
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=None, metric='proposal')
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
