# Mixup and label smoothing (MRLA, table 12, b). MRLA does not give their strength, so
# the smoothing is as in its other networks, and mixup as in MMPretrain's ResNet-50.
_base_ = './resnet50_8xb32_in1k.py'

model = dict(
    head=dict(loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1)),
    train_cfg=dict(augments=dict(type='Mixup', alpha=0.2)),
)
