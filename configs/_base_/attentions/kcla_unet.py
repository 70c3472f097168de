# Without the linear layer among the heads (section V-C), of which there are
# few in so narrow a network. Nor is there a ReLU in the authors' code.
backbone = dict(
    type='ELAUNetResNet',
    layer_attention=dict(type='KCLA', head_dim=16, head_attention='plain', relu=False),
)
