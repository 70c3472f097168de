_base_ = [
    './resnet20_1xb128_cifar10-folder.py',
    '../_base_/attentions/mrla-light_cifar.py',
]

model = dict(backbone=_base_.backbone)
