_base_ = './resnet20-mrla-base_1xb128_cifar10-folder.py'

model = dict(backbone=dict(depth=56))
