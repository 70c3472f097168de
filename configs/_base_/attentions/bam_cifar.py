# BAM in every block, which gives the parameters of ELA, table 1.
backbone = dict(
    type='ELABottleneckResNet_CIFAR',
    layer_attention=dict(type='Plugin', plugin=dict(type='BAM')),
)
