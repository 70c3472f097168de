_base_ = './retinanet_lite0_fpn_16e_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmela.WithLayerAttention',
        backbone=_base_.model.backbone,
        layer_attention=dict(type='MRLABase', zero_init=True),
    )
)
