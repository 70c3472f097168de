_base_ = './faster-rcnn_r50-narrow_ela_fpn_12e_shapes-128.py'

# Query and key have a few weights each, which hardly move in an epoch otherwise.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'layer_attn.query': dict(lr_mult=30, decay_mult=0),
            'layer_attn.key': dict(lr_mult=30, decay_mult=0),
        }
    )
)
