_base_ = [
    '_base_/unet_s5.py',
    '_base_/isic2017_256x256.py',
    '_base_/schedule_300e.py',
]
