_base_ = ['mmpretrain::_base_/models/resnet50.py', '../attentions/mrla-light_in1k.py']
_deprecation_ = dict(expected='../attentions/mrla-light_in1k.py')

model = dict(backbone=_base_.backbone)
