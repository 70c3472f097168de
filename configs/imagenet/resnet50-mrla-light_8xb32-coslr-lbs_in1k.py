_base_ = [
    './resnet50_8xb32-coslr-lbs_in1k.py',
    '../_base_/attentions/mrla-light_in1k.py',
]

model = dict(backbone=_base_.backbone)
