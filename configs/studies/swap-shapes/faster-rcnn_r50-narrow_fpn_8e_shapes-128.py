# Starts from the weights of a plain detector, with the setup of mmdet's fine-tuning:
# stage 1 is frozen, and norms keep their statistics.
_base_ = '../shapes/faster-rcnn_r50-narrow_fpn_12e_shapes-128.py'

model = dict(backbone=dict(frozen_stages=1, norm_eval=True))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=8, T_max=8),
]
train_cfg = dict(max_epochs=8, val_interval=8)
