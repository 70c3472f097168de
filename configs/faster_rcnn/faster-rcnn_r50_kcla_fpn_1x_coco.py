_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

# zero_init: the checkpoint is that of a plain ResNet. head_dim as in the
# authors' detectors.
model = dict(
    backbone=dict(
        type='ELAResNet', layer_attention=dict(type='KCLA', head_dim=64, zero_init=True)
    )
)
