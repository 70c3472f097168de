# A plain ResNet, for comparison under the same schedule.
_base_ = 'mmpretrain::_base_/models/resnet50.py'
