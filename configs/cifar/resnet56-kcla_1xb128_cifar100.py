_base_ = './resnet20-kcla_1xb128_cifar100.py'

model = dict(backbone=dict(depth=56))
