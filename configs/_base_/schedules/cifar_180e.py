# The schedule of the KCLA paper, section V-A. ELA trains for the same time and gives no
# further details. SGD with lr 0.1, momentum 0.9 and weight decay 1e-4 is inherited.
_base_ = 'mmpretrain::_base_/schedules/cifar10_bs128.py'

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True,
    ),
    dict(type='MultiStepLR', by_epoch=True, milestones=[100, 150], gamma=0.1),
]
train_cfg = dict(max_epochs=180)
