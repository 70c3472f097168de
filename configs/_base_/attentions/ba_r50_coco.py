# BA. Starts from a classifier with the same attention; train it first:
# tools/train.py configs/imagenet/resnet50-ba_8xb32_in1k.py
_base_ = './ba_in1k.py'

backbone = dict(
    init_cfg=dict(
        checkpoint='work_dirs/resnet50-ba_8xb32_in1k/epoch_100.pth',
        prefix='backbone.',
    )
)
