backbone = dict(
    type='ELABottleneckResNet_CIFAR', layer_attention=dict(type='KCLA', head_dim=16)
)
