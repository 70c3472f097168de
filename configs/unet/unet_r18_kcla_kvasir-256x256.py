_base_ = ['unet_r18_plain_kvasir-256x256.py']
# Without the linear layer among the heads (section V-C), of which there are
# few in so narrow a network.
model = dict(
    backbone=dict(
        type='ELAUNetResNet',
        layer_attention=dict(type='KCLA', head_dim=16, head_attention='plain'),
    )
)
