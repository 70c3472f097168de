_base_ = ['./resnet50_8xb32_in1k.py', '../_base_/attentions/mrla-light-d1_in1k.py']

model = dict(backbone=_base_.backbone)
