_base_ = [
    './resnet20-mrla-base_1xb128-10e_cifar10-folder.py',
    '../_base_/pruning/ela_cifar.py',
]

custom_hooks = [dict(_base_.custom_hooks[0], windows=[(1, 2), (5, 5)])]
