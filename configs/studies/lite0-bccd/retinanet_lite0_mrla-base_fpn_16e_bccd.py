_base_ = './retinanet_lite0_mrla-base-zero_fpn_16e_bccd.py'

# Like configs/_base_/swap.py, but heads depend on the channels
model = dict(
    backbone=dict(layer_attention=dict(_delete_=True, type='MRLABase', small_init=0.2))
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'layer_attn.query': dict(lr_mult=10, decay_mult=0),
            'layer_attn.key': dict(lr_mult=10, decay_mult=0),
        }
    )
)

# Prunes nothing, but measures divergences for the runs with pruning, which continue
# from one of its checkpoints.
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(7, 7), (11, 11)],
        policy=dict(type='FixedCount', count=0),
    )
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=-1))
