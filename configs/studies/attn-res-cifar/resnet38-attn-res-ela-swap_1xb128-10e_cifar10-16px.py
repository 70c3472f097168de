_base_ = './resnet38-attn-res-swap_1xb128-10e_cifar10-16px.py'

# Pruning as in configs/_base_/pruning/ela_cifar.py, in windows for 10 epochs
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(1, 2), (5, 5)],
        policy=dict(type='EBQM', gamma=0.5, alpha=5, beta=1, mu=0.3),
    ),
    *_base_.custom_hooks,
]
