_base_ = './resnet20_cifar.py'
_deprecation_ = dict(expected='./resnet20_cifar.py')
