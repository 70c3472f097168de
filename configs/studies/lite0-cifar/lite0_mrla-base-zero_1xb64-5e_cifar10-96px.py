_base_ = './lite0_1xb64-5e_cifar10-96px.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmela.WithLayerAttention',
        backbone=_base_.model.backbone,
        layer_attention=dict(type='MRLABase', zero_init=True),
    )
)
