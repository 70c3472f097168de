# 300 epochs of AdamW, with lr 0.001 for a batch of 1024 and a warm-up of 5 epochs
# (MRLA, appendix B.1).
_base_ = 'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py'

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5),
]
