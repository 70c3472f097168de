# There is no linear layer among the heads (section V-C), because so narrow a network
# has few heads. The authors' code has no ReLU, either.
backbone = dict(
    type='ELAUNetResNet',
    layer_attention=dict(type='KCLA', head_dim=16, head_attention='plain', relu=False),
)
