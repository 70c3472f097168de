# The ResNet-UNet of KCLA, section V-C: 1.53 M parameters.
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size_divisor=8,
        test_cfg=dict(size_divisor=8),
    ),
    backbone=dict(
        type='UNetResNet',
        depth=18,
        stem_channels=16,
        stage_channels=(32, 64, 128, 128),
        strides=(2, 2, 2, 1),
        norm_cfg=norm_cfg,
        zero_init_residual=False,
    ),
    decode_head=dict(
        type='UNetHead',
        in_channels=(16, 32, 64, 128, 128),
        decoder_channels=(64, 32, 16, 16),
        norm_cfg=norm_cfg,
        # One channel: the probability of a lesion
        num_classes=2,
        out_channels=1,
        threshold=0.5,
        dropout_ratio=0,
        align_corners=True,
        loss_decode=[
            dict(type='CrossEntropyLoss', use_sigmoid=True, avg_non_ignore=True),
            dict(type='ForegroundDiceLoss'),
        ],
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
