backbone = dict(
    type='ELAEfficientNet', layer_attention=dict(type='MRLABase', head_dim=8)
)
