# zero_init, because the checkpoint comes from a plain ResNet
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet',
    layer_attention=dict(type='MRLALight', head_dim=32, zero_init=True),
)
