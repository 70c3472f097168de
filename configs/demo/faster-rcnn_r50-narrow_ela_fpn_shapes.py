# A Faster R-CNN that trains from scratch on a laptop's CPU in minutes: all layers are
# a quarter as wide as usual, with few images and few proposals.
#
# The data come from `mmela shapes data/shapes`. They have COCO's categories, so the
# config also runs on COCO, or on any data with its layout and categories: just set
# `--cfg-options data_root=DIR`.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/ela_coco.py']
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)
# Passes a changed data_root on to the data sets and evaluators
runner_type = 'DataRootRunner'

model = dict(
    backbone=dict(
        type='ELAResNet',
        base_channels=16,
        layer_attention=dict(type='MRLABase', head_dim=16),
        # Everything trains from scratch, including norms
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=64),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # Half as large as usual, like the objects
        anchor_generator=dict(scales=[4]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28),
        bbox_head=dict(in_channels=64, fc_out_channels=256, reg_class_agnostic=True),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=200),
        rcnn=dict(sampler=dict(num=64, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=200)),
)

data_root = 'data/shapes/'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(192, 192), keep_ratio=True),
    dict(
        type='RandomFlip',
        prob=[0.25, 0.25, 0.25],
        direction=['horizontal', 'vertical', 'diagonal'],
    ),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 192), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        # Images without objects are useful negatives
        filter_cfg=dict(filter_empty_gt=False, min_size=32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(data_root=data_root, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
    # Otherwise query and key stay near their random start in so few steps (1 % in
    # the first epoch), and pruning would be arbitrary.
    paramwise_cfg=dict(
        custom_keys={
            'layer_attn.query': dict(lr_mult=30, decay_mult=0),
            'layer_attn.key': dict(lr_mult=30, decay_mult=0),
        }
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        begin=0,
        end=12,
        T_max=12,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=12, val_interval=2)
default_hooks = dict(
    logger=dict(interval=10),
    # Keep epoch 6, before the last pruning, for tools/demo.py
    checkpoint=dict(max_keep_ckpts=7),
    # The whole model in channels_last: 8 % faster on a CPU
    memory_format=dict(type='MemoryFormatHook', module=''),
)
custom_hooks = [
    # If one epoch is not enough to learn, decide after the second or third one.
    dict(_base_.custom_hooks[0], put_off_until=3),
]
randomness = dict(seed=0)
