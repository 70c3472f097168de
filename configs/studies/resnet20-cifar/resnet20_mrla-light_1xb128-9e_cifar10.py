_base_ = [
    './resnet20_1xb128-9e_cifar10.py',
    '../../_base_/attentions/mrla-light_cifar.py',
]

model = dict(backbone=_base_.backbone)
