_base_ = './pvtv2-b0_8xb128_in1k.py'

model = dict(backbone=dict(embed_dims=64), head=dict(in_channels=512))
