_base_ = ['./resnet56_1xb128_cifar100.py', '../_base_/attentions/dia_cifar.py']

model = dict(backbone=_base_.backbone)
