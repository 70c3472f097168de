_base_ = ['./resnet-mrla-base_cifar.py', '../pruning/ela_cifar.py']
_deprecation_ = dict(expected='../pruning/ela_cifar.py')
