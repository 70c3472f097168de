_base_ = './retinanet_lite0_attn-res_fpn_16e_bccd.py'

# Like configs/_base_/swap.py, with windows for this schedule
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(7, 7), (11, 11)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2),
    )
]
