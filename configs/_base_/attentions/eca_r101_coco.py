_base_ = './eca_r50_coco.py'

backbone = dict(
    init_cfg=dict(checkpoint='work_dirs/resnet101-eca_8xb32_in1k/epoch_100.pth')
)
