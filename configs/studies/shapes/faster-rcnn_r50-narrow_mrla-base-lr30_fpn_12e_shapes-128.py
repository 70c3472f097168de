_base_ = './faster-rcnn_r50-narrow_ela-lr30_fpn_12e_shapes-128.py'

custom_hooks = _base_.custom_hooks[1:]  # all but the pruning
