_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/attentions/dla-light_r50_coco.py',
]

model = dict(backbone=_base_.backbone)
