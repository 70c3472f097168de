# From table 1 of DenseNet; MMPretrain has no DenseNet of this depth.
_base_ = './densenet161_8xb32_in1k.py'

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, growth_rate=32, depths=[6, 12, 64, 48], init_channels=64
        )
    ),
    head=dict(in_channels=2688),
)
