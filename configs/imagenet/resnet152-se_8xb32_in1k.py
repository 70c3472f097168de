_base_ = ['./resnet152_8xb32_in1k.py', '../_base_/attentions/se_in1k.py']

model = dict(backbone=_base_.backbone)
