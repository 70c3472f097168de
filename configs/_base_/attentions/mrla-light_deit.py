custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAVisionTransformer', layer_attention=dict(type='MRLALight', head_dim=16)
)
