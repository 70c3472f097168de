_base_ = ['./ceit-tiny_8xb128_in1k.py', '../_base_/attentions/mrla-base_ceit.py']

model = dict(backbone=_base_.backbone)
