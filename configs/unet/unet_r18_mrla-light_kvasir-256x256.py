_base_ = ['unet_r18_plain_kvasir-256x256.py']
model = dict(
    backbone=dict(
        type='ELAUNetResNet', layer_attention=dict(type='MRLALight', head_dim=16)
    )
)
