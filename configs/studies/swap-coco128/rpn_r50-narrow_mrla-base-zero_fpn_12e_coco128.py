_base_ = './rpn_r50-narrow_fpn_12e_coco128.py'

model = dict(
    backbone=dict(
        type='ELAResNet',
        layer_attention=dict(type='MRLABase', head_dim=16, zero_init=True),
    )
)
