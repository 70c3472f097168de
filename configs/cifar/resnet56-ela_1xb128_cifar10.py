_base_ = ['./resnet56-mrla-base_1xb128_cifar10.py', '../_base_/pruning/ela_cifar.py']
