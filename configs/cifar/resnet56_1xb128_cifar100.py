_base_ = './resnet20_1xb128_cifar100.py'

model = dict(backbone=dict(depth=56))
