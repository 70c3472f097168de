_base_ = [
    './resnet38_1xb128-10e_cifar10-16px.py',
    '../../_base_/attentions/mrla-base_cifar.py',
]

model = dict(backbone=_base_.backbone)

# Prunes nothing, but its checkpoints have the divergences of the first window. Runs
# with pruning continue from epoch 1.
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(1, 2)],
        policy=dict(type='FixedCount', count=0),
    ),
    *_base_.custom_hooks,
]
