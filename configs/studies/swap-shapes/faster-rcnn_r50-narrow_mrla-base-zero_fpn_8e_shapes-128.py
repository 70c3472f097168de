_base_ = './faster-rcnn_r50-narrow_fpn_8e_shapes-128.py'

model = dict(
    backbone=dict(
        type='ELAResNet',
        layer_attention=dict(type='MRLABase', head_dim=16, zero_init=True),
    )
)
