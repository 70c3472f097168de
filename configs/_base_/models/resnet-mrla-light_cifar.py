_base_ = './resnet_cifar.py'

model = dict(
    backbone=dict(
        type='ELAResNet_CIFAR', layer_attention=dict(type='MRLALight', head_dim=16)
    )
)
