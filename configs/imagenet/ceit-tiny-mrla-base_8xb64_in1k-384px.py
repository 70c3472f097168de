_base_ = ['./ceit-tiny_8xb64_in1k-384px.py', '../_base_/attentions/mrla-base_ceit.py']

model = dict(backbone=_base_.backbone)
