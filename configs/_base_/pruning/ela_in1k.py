# Pruning as in the ELA paper, section 4.1. The paper gives no gamma.
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(1, 3), (51, 53)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.25),
    )
]
