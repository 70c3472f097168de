backbone = dict(
    type='ELABottleneckResNet_CIFAR',
    layer_attention=dict(type='MRLALight', head_dim=16),
)
