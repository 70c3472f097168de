_base_ = [
    './efficientnet-b1_8xb96_in1k.py',
    '../_base_/attentions/mrla-light_efficientnet.py',
]

model = dict(backbone=_base_.backbone)
