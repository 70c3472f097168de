# Pruning as in the ELA paper, section 4.2. The paper gives no gamma.
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(1, 1), (7, 7)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2),
    )
]
