_base_ = './ba_r50_coco.py'

backbone = dict(
    init_cfg=dict(checkpoint='work_dirs/resnet101-ba_8xb32_in1k/epoch_100.pth')
)
