_base_ = './rpn_r50-narrow_mrla-base_fpn_12e_coco128.py'

# Windows start after query and key have learned
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(3, 3), (8, 8)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2),
    ),
    *_base_.custom_hooks,
]
