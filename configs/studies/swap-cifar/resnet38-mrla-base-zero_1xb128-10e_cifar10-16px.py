_base_ = './resnet38_1xb128-10e_cifar10-16px.py'

model = dict(
    backbone=dict(
        type='ELABottleneckResNet_CIFAR',
        layer_attention=dict(type='MRLABase', head_dim=16, zero_init=True),
    )
)
