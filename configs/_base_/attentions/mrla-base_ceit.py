# The value has no GELU (MRLA, algorithm 2).
backbone = dict(
    type='ELACeiT',
    layer_attention=dict(type='MRLABase', head_dim=16, value_act_cfg=None),
)
