_base_ = './faster-rcnn_r50-narrow_mrla-base-zero_fpn_8e_shapes-128.py'

# Pruning as in configs/_base_/pruning/ela_coco.py, with windows for eight epochs
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(1, 1), (5, 5)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2),
    ),
    *_base_.custom_hooks,
]
