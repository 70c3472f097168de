_base_ = [
    'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py',
    '../_base_/attentions/eca_r101_coco.py',
]

model = dict(backbone=_base_.backbone)
