_base_ = 'mmpretrain::_base_/models/resnet50.py'
_deprecation_ = dict(expected='mmpretrain::_base_/models/resnet50.py')
