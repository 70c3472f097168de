# For a network that starts from the weights of a plain ResNet: attention that
# takes part from the first iteration on, and learns. What it gained, and where it
# did not, is in docs/choosing.md. A config takes the parts that it needs:
#
#   model = dict(backbone=_base_.backbone)
#   optim_wrapper = dict(paramwise_cfg=_base_.paramwise_cfg)
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet',
    # What the attention adds shifts the features: norms have to follow. Where
    # batches are too small for that, synchronize them (norm_cfg of the backbone),
    # or keep norm_eval=True and give the attention a norm that normalizes then:
    # norm_cfg=dict(type='GN', num_groups=32).
    norm_eval=False,
    layer_attention=dict(type='MRLABase', head_dim=32, small_init=0.2),
)

# At the learning rate of a fine-tuning, query and key stay what they were
# drawn as, and so does what pruning would decide.
paramwise_cfg = dict(
    custom_keys={
        'layer_attn.query': dict(lr_mult=10, decay_mult=0),
        'layer_attn.key': dict(lr_mult=10, decay_mult=0),
    }
)

# Windows after query and key have learned
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(3, 3), (8, 8)],
        policy=dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2),
    )
]
