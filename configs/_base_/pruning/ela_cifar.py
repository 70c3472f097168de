# Pruning as in the ELA paper, section 4.1. The paper gives no gamma.
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(1, 3), (45, 48), (91, 93)],
        policy=dict(type='EBQM', gamma=0.5, alpha=5, beta=1, mu=0.3),
    )
]
