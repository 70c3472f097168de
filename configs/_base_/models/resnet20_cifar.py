# The layer attention papers' bottleneck ResNet for CIFAR, without attention.
_base_ = 'mmpretrain::_base_/models/resnet18_cifar.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True, type='BottleneckResNet_CIFAR', depth=20, style='pytorch'
    ),
    head=dict(in_channels=256),
)
