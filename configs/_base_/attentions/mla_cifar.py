backbone = dict(
    type='ELABottleneckResNet_CIFAR', layer_attention=dict(type='MLA', head_dim=16)
)
