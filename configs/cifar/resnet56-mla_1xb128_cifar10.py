_base_ = './resnet20-mla_1xb128_cifar10.py'

model = dict(backbone=dict(depth=56))
