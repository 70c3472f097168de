_base_ = './resnet38-ela_1xb128-10e_cifar10-16px.py'

# All norms but those of stage 1 train, and so may those of the attention.
model = dict(
    backbone=dict(
        norm_eval=False,
        layer_attention=dict(norm_cfg=dict(_delete_=True, type='BN')),
    )
)
