_base_ = './deit-tiny_8xb128_in1k.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        type='ELAVisionTransformer', layer_attention=dict(type='MRLABase', head_dim=16)
    )
)
