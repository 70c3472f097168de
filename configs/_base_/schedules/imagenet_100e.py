# 100 epochs, lr 0.1 divided by 10 every 30 epochs (MRLA, appendix B.1), which
# is the inherited schedule, with a warm-up.
_base_ = 'mmpretrain::_base_/schedules/imagenet_bs256.py'

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.1,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='MultiStepLR', by_epoch=True, milestones=[30, 60, 90], gamma=0.1),
]
