backbone = dict(
    type='ELABottleneckResNet_CIFAR',
    layer_attention=dict(type='DLABase', head_dim=16, reduction=4),
)
