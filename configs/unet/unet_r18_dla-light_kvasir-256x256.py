_base_ = [
    './unet_r18_plain_kvasir-256x256.py',
    '../_base_/attentions/dla-light_unet.py',
]

model = dict(backbone=_base_.backbone)
