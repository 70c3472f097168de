custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAVisionTransformer', layer_attention=dict(type='MRLABase', head_dim=16)
)
