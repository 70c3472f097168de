# Efficient channel attention in every block; needs timm.
backbone = dict(
    type='ELABottleneckResNet_CIFAR',
    layer_attention=dict(type='Plugin', plugin=dict(type='ECA')),
)
