_base_ = './efficientnet-b1_8xb96_in1k.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        type='ELAEfficientNet', layer_attention=dict(type='MRLABase', head_dim=8)
    )
)
