_base_ = ['./resnet101_8xb32_in1k.py', '../_base_/attentions/aa_in1k.py']

model = dict(
    backbone=dict(_base_.backbone, blocks=[[], [*range(4)], [*range(23)], [*range(3)]])
)
