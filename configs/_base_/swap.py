# For a network that starts from the weights of a plain ResNet. The attention
# contributes and learns from the first iteration on. docs/choosing.md shows where it
# helps, and where it does not. A config uses the parts that it needs:
#
#   model = dict(backbone=_base_.backbone)
#   optim_wrapper = dict(paramwise_cfg=_base_.paramwise_cfg)
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet',
    # The attention shifts the features, so the norms must adapt. If batches are too
    # small for that, synchronize the norms (norm_cfg of the backbone), or keep
    # norm_eval=True and give the attention a norm without running statistics:
    # norm_cfg=dict(type='GN', num_groups=32).
    norm_eval=False,
    layer_attention=dict(type='MRLABase', head_dim=32, small_init=0.2),
)

# At the learning rate of fine-tuning, query and key stay at their random start, and
# pruning would be arbitrary. AttnRes needs the opposite: lr_mult=0.1 for its query.
paramwise_cfg = dict(
    custom_keys={
        'layer_attn.query': dict(lr_mult=10, decay_mult=0),
        'layer_attn.key': dict(lr_mult=10, decay_mult=0),
    }
)

# Windows start after query and key have learned
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(3, 3), (8, 8)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2),
    )
]
