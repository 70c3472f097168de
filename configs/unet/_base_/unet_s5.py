# The original U-Net with half its width. Its parameters and FLOPs match the one for
# ISIC in KCLA's table IV.
_base_ = './unet_r18.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='UNet',
        base_channels=32,
        norm_cfg=_base_.norm_cfg,
        upsample_cfg=dict(type='DeconvModule', kernel_size=2),
    ),
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=32,
        in_index=4,
        channels=32,
        num_convs=0,
        concat_input=False,
        num_classes=2,
        out_channels=1,
        threshold=0.5,
        dropout_ratio=0,
        align_corners=True,
        loss_decode=_base_.model.decode_head.loss_decode,
    ),
)
