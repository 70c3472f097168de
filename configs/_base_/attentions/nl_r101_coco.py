_base_ = './nl_r50_coco.py'

backbone = dict(blocks=[[], [], [21], []])
