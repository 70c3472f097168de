_base_ = './pvtv2-b1_8xb128_in1k.py'

model = dict(
    backbone=dict(
        layer_attention=dict(type='MRLALight', head_dim=16), attention_blocks=None
    )
)
