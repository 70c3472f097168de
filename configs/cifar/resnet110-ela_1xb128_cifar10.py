_base_ = './resnet20-ela_1xb128_cifar10.py'

model = dict(backbone=dict(depth=110))
