_base_ = [
    '../_base_/models/resnet56_cifar.py',
    '../_base_/datasets/cifar10_bs128.py',
    '../_base_/schedules/cifar_180e.py',
    'mmpretrain::_base_/default_runtime.py',
]
