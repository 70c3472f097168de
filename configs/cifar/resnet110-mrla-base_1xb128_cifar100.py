_base_ = './resnet20-mrla-base_1xb128_cifar100.py'

model = dict(backbone=dict(depth=110))
