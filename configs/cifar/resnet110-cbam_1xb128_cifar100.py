_base_ = ['./resnet110_1xb128_cifar100.py', '../_base_/attentions/cbam_cifar.py']

model = dict(backbone=_base_.backbone)
