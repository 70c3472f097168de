_base_ = './resnet38_1xb128-10e_cifar10-16px.py'

# A small start, with a norm that also normalizes with norm_eval=True
model = dict(
    backbone=dict(
        type='ELABottleneckResNet_CIFAR',
        layer_attention=dict(
            type='MRLABase',
            head_dim=16,
            small_init=0.2,
            norm_cfg=dict(type='GN', num_groups=8),
        ),
    )
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'layer_attn.query': dict(lr_mult=10, decay_mult=0),
            'layer_attn.key': dict(lr_mult=10, decay_mult=0),
        }
    )
)
