_base_ = ['./resnet152_8xb32_in1k.py', '../_base_/attentions/eca_in1k.py']

model = dict(backbone=_base_.backbone)
