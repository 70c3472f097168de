backbone = dict(
    type='ELAUNetResNet', layer_attention=dict(type='MRLALight', head_dim=16)
)
