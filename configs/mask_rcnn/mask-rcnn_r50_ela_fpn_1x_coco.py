_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/ela_coco.py']

# zero_init: the checkpoint is that of a plain ResNet
model = dict(
    backbone=dict(
        type='ELAResNet',
        layer_attention=dict(type='MRLABase', head_dim=32, zero_init=True),
    )
)
