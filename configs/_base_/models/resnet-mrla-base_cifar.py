_base_ = ['./resnet20_cifar.py', '../attentions/mrla-base_cifar.py']
_deprecation_ = dict(expected='../attentions/mrla-base_cifar.py')

model = dict(backbone=_base_.backbone)
