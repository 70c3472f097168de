_base_ = './faster-rcnn_r50-narrow_mrla-base_fpn_8e_shapes-128.py'

# Windows start after query and key have learned
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(3, 3), (6, 6)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2),
    ),
    *_base_.custom_hooks,
]
