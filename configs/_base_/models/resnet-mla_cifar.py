_base_ = ['./resnet20_cifar.py', '../attentions/mla_cifar.py']
_deprecation_ = dict(expected='../attentions/mla_cifar.py')

model = dict(backbone=_base_.backbone)
