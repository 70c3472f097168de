# Instead of stochastic depth (MRLA, table 12, b).
_base_ = [
    './resnet50_8xb32-mixup-lbs_in1k.py',
    '../_base_/attentions/mrla-light_in1k.py',
]

model = dict(
    backbone=dict(
        _base_.backbone,
        layer_attention=dict(_base_.backbone.layer_attention, drop_path=0.0),
    )
)
