_base_ = ['./pvtv2-b0_8xb128_in1k.py', '../_base_/attentions/mrla-base_pvtv2.py']

model = dict(backbone=_base_.backbone)
