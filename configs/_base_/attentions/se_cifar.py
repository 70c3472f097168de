# Squeeze and excitation without biases, in every block.
backbone = dict(
    type='ELABottleneckResNet_CIFAR',
    layer_attention=dict(type='Plugin', plugin=dict(type='SqueezeExcitation')),
)
