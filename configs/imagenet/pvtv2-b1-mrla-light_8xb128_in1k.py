_base_ = ['./pvtv2-b1_8xb128_in1k.py', '../_base_/attentions/mrla-light_pvtv2.py']

model = dict(backbone=_base_.backbone)
