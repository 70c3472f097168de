backbone = dict(
    type='ELAEfficientNet', layer_attention=dict(type='MRLALight', head_dim=8)
)
