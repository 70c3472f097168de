_base_ = './resnet20-ela_1xb128_cifar10-folder.py'

model = dict(backbone=dict(depth=56))
