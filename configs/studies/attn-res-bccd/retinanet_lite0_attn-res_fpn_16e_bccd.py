_base_ = '../lite0-bccd/retinanet_lite0_mrla-base-zero_fpn_16e_bccd.py'

# Output-identical to the plain detector at first
model = dict(
    backbone=dict(
        layer_attention=dict(_delete_=True, type='AttnRes', total='sum', zero_init=True)
    )
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'layer_attn.query': dict(lr_mult=10, decay_mult=0)})
)
