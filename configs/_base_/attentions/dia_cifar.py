backbone = dict(
    type='ELABottleneckResNet_CIFAR',
    layer_attention=dict(type='DIA', reduction=4),
)
