_base_ = './resnet38-mrla-base_1xb128-10e_cifar10-16px.py'

# Like configs/_base_/swap.py: norms train, except in stage 1.
model = dict(
    backbone=dict(
        norm_eval=False,
        layer_attention=dict(norm_cfg=dict(_delete_=True, type='BN')),
    )
)
