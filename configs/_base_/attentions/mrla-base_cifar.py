backbone = dict(
    type='ELABottleneckResNet_CIFAR', layer_attention=dict(type='MRLABase', head_dim=16)
)
