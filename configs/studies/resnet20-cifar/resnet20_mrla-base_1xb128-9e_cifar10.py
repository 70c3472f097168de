_base_ = [
    './resnet20_1xb128-9e_cifar10.py',
    '../../_base_/attentions/mrla-base_cifar.py',
]

backbone = _base_.backbone
backbone.layer_attention.small_init = 0.2
model = dict(backbone=backbone)

# Prunes nothing, but measures divergences for the runs with pruning, which continue
# from one of its checkpoints.
custom_hooks = [
    dict(
        type='LayerAttentionPruningHook',
        windows=[(3, 3), (5, 5)],
        policy=dict(type='FixedCount', count=0),
    )
]
