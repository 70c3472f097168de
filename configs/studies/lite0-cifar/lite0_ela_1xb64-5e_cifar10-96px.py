_base_ = './lite0_mrla-base_1xb64-5e_cifar10-96px.py'

# Like configs/_base_/swap.py, with windows for this schedule
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(2, 2), (3, 3)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2),
    )
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
