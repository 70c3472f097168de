# All blocks have attention here; in the plain config none does. The value has no GELU
# (MRLA, algorithm 2).
backbone = dict(
    layer_attention=dict(type='MRLABase', head_dim=16, value_act_cfg=None),
    blocks='auto',
)
