# Efficient channel attention in every block; needs timm.
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet',
    layer_attention=dict(type='Plugin', plugin=dict(type='ECA')),
)
