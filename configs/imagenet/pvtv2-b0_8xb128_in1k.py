# MMDetection's PVTv2 as a plain classifier with DeiT's recipe. It uses mmela's class
# without attention, because that outputs a tuple, which MMPretrain's necks need.
_base_ = './deit-tiny_8xb128_in1k.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.ELAPyramidVisionTransformerV2',
        embed_dims=32,
        num_layers=[2, 2, 2, 2],
        num_heads=[1, 2, 5, 8],
        out_indices=(3,),
        drop_path_rate=0.1,
        layer_attention=dict(type='MRLABase', head_dim=16),
        blocks=[[], [], [], []],
    ),
    neck=dict(_delete_=True, type='GlobalAveragePooling'),
    head=dict(
        _delete_=True,
        type='LinearClsHead',
        num_classes=1000,
        in_channels=256,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
