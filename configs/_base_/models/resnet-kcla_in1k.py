# Head width and stochastic depth on the attention alone as published with
# the KCLA paper (section V-A).
_base_ = './resnet_in1k.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        type='ELAResNet', layer_attention=dict(type='KCLA', head_dim=32, drop_path=0.2)
    )
)
