_base_ = './nl_r50_coco.py'

backbone = dict(attention_blocks=[[], [], [21], []])
