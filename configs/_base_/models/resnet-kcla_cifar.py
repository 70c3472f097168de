_base_ = ['./resnet20_cifar.py', '../attentions/kcla_cifar.py']
_deprecation_ = dict(expected='../attentions/kcla_cifar.py')

model = dict(backbone=_base_.backbone)
