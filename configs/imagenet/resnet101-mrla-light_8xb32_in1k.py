_base_ = './resnet50-mrla-light_8xb32_in1k.py'

model = dict(backbone=dict(depth=101))
