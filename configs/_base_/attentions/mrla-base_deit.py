# The value has no GELU (MRLA, algorithm 2).
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAVisionTransformer',
    layer_attention=dict(type='MRLABase', head_dim=16, value_act_cfg=None),
)
