# Cosine schedule and label smoothing, as for BA-Net (MRLA, table 6).
_base_ = './resnet50_8xb32_in1k.py'

model = dict(head=dict(loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1)))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=100, by_epoch=True)]
