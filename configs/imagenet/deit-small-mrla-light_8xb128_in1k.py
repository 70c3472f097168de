_base_ = ['./deit-small_8xb128_in1k.py', '../_base_/attentions/mrla-light_deit.py']

model = dict(backbone=_base_.backbone)
