_base_ = './rla-g_r50_coco.py'

backbone = dict(
    init_cfg=dict(checkpoint='work_dirs/resnet101-rla-g_8xb32_in1k/epoch_100.pth')
)
