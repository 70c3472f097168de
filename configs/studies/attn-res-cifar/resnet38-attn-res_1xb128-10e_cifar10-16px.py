# From scratch: weights that sum to 1, as published
_base_ = '../cifar/resnet38_1xb128-10e_cifar10-16px.py'

model = dict(
    backbone=dict(
        type='ELABottleneckResNet_CIFAR',
        layer_attention=dict(type='AttnRes', per='position', heads=1, total='mean'),
    )
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'layer_attn.query': dict(lr_mult=10, decay_mult=0)})
)
