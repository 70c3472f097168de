_base_ = './resnet20-mrla-light_1xb128_cifar10.py'

model = dict(backbone=dict(depth=56))
