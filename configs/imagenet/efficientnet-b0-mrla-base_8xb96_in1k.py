_base_ = [
    './efficientnet-b0_8xb96_in1k.py',
    '../_base_/attentions/mrla-base_efficientnet.py',
]

model = dict(backbone=_base_.backbone)
