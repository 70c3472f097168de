# 100 epochs, with lr 0.1 divided by 10 every 30 epochs (MRLA, appendix B.1), which is
# the inherited schedule. The warm-up follows the authors' command and code: epochs 0, 1
# and 2 at about 0, 1/3 and 2/3 of the learning rate. Their text mentions none.
_base_ = 'mmpretrain::_base_/schedules/imagenet_bs256.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=4),
    dict(type='MultiStepLR', by_epoch=True, milestones=[30, 60, 90], gamma=0.1),
]
