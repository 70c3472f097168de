_base_ = [
    './resnet20_1xb128-10e_cifar10-folder.py',
    '../_base_/attentions/mrla-base_cifar.py',
]

model = dict(backbone=_base_.backbone)
