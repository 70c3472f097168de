# Goes on from the weights of a plain detector, as mmdet's configs fine-tune:
# stage 1 frozen, the statistics of the norms kept.
_base_ = './faster-rcnn_r50-narrow_fpn_12e_coco128-person-start.py'

model = dict(backbone=dict(frozen_stages=1, norm_eval=True))
