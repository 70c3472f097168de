_base_ = ['./ceit-tiny_8xb64_in1k-384px.py', '../_base_/attentions/mrla-light_ceit.py']

model = dict(backbone=_base_.backbone)
