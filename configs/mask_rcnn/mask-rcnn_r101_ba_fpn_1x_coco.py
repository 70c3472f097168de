_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py',
    '../_base_/attentions/ba_r101_coco.py',
]

model = dict(backbone=_base_.backbone)
