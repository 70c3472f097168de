# A plain ResNet for comparison, with the same schedule.
_base_ = [
    'mmpretrain::_base_/models/resnet152.py',
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_100e.py',
    'mmpretrain::_base_/default_runtime.py',
]
