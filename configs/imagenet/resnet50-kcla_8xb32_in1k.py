_base_ = ['./resnet50_8xb32_in1k.py', '../_base_/attentions/kcla_in1k.py']

model = dict(backbone=_base_.backbone)

# Warm-up and steps of the authors' code; the paper (section V-A) gives neither.
param_scheduler = [
    _base_.param_scheduler[0],
    dict(type='MultiStepLR', by_epoch=True, milestones=[40, 70, 90], gamma=0.1),
]
randomness = dict(seed=42)  # KCLA, section V
