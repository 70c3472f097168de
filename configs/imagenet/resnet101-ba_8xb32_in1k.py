_base_ = ['./resnet101_8xb32_in1k.py', '../_base_/attentions/ba_in1k.py']

model = dict(backbone=_base_.backbone)
