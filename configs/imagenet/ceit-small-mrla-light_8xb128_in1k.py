_base_ = ['./ceit-small_8xb128_in1k.py', '../_base_/attentions/mrla-light_ceit.py']

model = dict(backbone=_base_.backbone)
