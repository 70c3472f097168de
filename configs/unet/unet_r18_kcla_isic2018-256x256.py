_base_ = ['./unet_r18_plain_isic2018-256x256.py', '../_base_/attentions/kcla_unet.py']

model = dict(backbone=_base_.backbone)
