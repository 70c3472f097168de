# Starts from the weights of a plain network, with the setup of mmdet's fine-tuning:
# stage 1 is frozen, and norms keep their statistics.
_base_ = './rpn_r50-narrow_fpn_12e_coco128-start.py'

model = dict(backbone=dict(frozen_stages=1, norm_eval=True))
