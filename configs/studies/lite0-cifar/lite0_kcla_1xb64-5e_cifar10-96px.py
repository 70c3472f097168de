_base_ = './lite0_mrla-base_1xb64-5e_cifar10-96px.py'

# Stages are not linked, because a block without a shortcut lies between them
model = dict(backbone=dict(layer_attention=dict(type='KCLA', cross_stage=False)))
custom_hooks = []
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
