_base_ = './resnet50-kcla_8xb32_in1k.py'

model = dict(backbone=dict(depth=101))
