backbone = dict(
    type='ELAUNetResNet', layer_attention=dict(type='DLALight', head_dim=16)
)
