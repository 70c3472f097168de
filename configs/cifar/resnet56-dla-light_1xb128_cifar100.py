_base_ = ['./resnet56_1xb128_cifar100.py', '../_base_/attentions/dla-light_cifar.py']

model = dict(backbone=_base_.backbone)
