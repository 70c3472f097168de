_base_ = [
    '../_base_/models/resnet20_cifar.py',
    '../_base_/datasets/cifar10-folder_bs128.py',
    '../_base_/schedules/cifar_10e.py',
    'mmpretrain::_base_/default_runtime.py',
]
