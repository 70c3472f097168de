_base_ = './resnet38-attn-res-swap_1xb128-10e_cifar10-16px.py'

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'layer_attn.query': dict(lr_mult=0.1)})
)
