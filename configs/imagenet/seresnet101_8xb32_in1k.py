# SE in every block, for comparison under the same schedule.
_base_ = './resnet101_8xb32_in1k.py'

model = dict(backbone=dict(type='SEResNet'))
