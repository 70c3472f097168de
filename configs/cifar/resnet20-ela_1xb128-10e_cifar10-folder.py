_base_ = [
    '../_base_/models/resnet-ela_cifar.py',
    '../_base_/datasets/cifar10-folder_bs128.py',
    '../_base_/schedules/cifar_10e.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(1, 2), (5, 5)],
        policy=dict(type='EBQM', gamma=0.5, alpha=5, beta=1, mu=0.3),
    )
]
