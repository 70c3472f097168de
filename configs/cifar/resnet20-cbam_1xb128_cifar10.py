_base_ = ['./resnet20_1xb128_cifar10.py', '../_base_/attentions/cbam_cifar.py']

model = dict(backbone=_base_.backbone)
