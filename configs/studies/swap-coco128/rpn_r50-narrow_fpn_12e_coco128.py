# Goes on from the weights of a plain network, as mmdet's configs fine-tune:
# stage 1 frozen, the statistics of the norms kept.
_base_ = './rpn_r50-narrow_fpn_12e_coco128-start.py'

model = dict(backbone=dict(frozen_stages=1, norm_eval=True))
