_base_ = './resnet38-mrla-base_1xb128-10e_cifar10-16px.py'

# Pruning as in configs/_base_/pruning/ela_cifar.py, but later, after query and key
# have learned.
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(3, 3), (6, 6)],
        policy=dict(type='EBQM', gamma=0.5, alpha=5, beta=1, mu=0.3),
    ),
    *_base_.custom_hooks,
]
