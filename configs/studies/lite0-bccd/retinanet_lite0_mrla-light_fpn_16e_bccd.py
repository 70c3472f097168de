_base_ = './retinanet_lite0_mrla-base_fpn_16e_bccd.py'

model = dict(backbone=dict(layer_attention=dict(type='MRLALight')))
custom_hooks = []
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
