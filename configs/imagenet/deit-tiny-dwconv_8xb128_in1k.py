_base_ = ['./deit-tiny_8xb128_in1k.py', '../_base_/attentions/dwconv_deit.py']

model = dict(backbone=_base_.backbone)
