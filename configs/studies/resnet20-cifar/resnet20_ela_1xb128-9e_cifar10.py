_base_ = './resnet20_mrla-base_1xb128-9e_cifar10.py'

# Like configs/_base_/pruning/ela_cifar.py, with windows for this schedule
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(3, 3), (5, 5)],
        policy=dict(type='EBQM', gamma=0.5, alpha=5, beta=1, mu=0.3),
    )
]
