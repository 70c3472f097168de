# A short schedule to try training on a CPU.
_base_ = 'mmpretrain::_base_/schedules/cifar10_bs128.py'

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(type='MultiStepLR', by_epoch=True, milestones=[6, 9], gamma=0.1),
]
train_cfg = dict(max_epochs=10)
