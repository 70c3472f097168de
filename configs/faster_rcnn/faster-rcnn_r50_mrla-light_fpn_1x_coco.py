_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

# zero_init: the checkpoint is that of a plain ResNet
model = dict(
    backbone=dict(
        type='ELAResNet',
        layer_attention=dict(type='MRLALight', head_dim=32, zero_init=True),
    )
)
