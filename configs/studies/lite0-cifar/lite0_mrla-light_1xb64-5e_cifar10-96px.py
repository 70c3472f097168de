_base_ = './lite0_mrla-base_1xb64-5e_cifar10-96px.py'

model = dict(backbone=dict(layer_attention=dict(type='MRLALight')))
custom_hooks = []
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
