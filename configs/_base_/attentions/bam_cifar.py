# BAM, in every block: only so the parameters are those of ELA, table 1.
backbone = dict(
    type='ELABottleneckResNet_CIFAR',
    layer_attention=dict(type='Plugin', plugin=dict(type='BAM')),
)
