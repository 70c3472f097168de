_base_ = './mask-rcnn_r50_se_fpn_1x_coco.py'

model = dict(backbone=dict(depth=101))
