_base_ = [
    './resnet38_1xb128-10e_cifar10-16px.py',
    '../../_base_/attentions/mrla-light_cifar.py',
]

model = dict(backbone=_base_.backbone)
