_base_ = ['./resnet20_1xb128_cifar100.py', '../_base_/attentions/se_cifar.py']

model = dict(backbone=_base_.backbone)
