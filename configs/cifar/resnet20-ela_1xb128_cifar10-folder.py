_base_ = [
    './resnet20-mrla-base_1xb128_cifar10-folder.py',
    '../_base_/pruning/ela_cifar.py',
]
