_base_ = [
    '_base_/unet_r18.py',
    '_base_/isic2018_256x256.py',
    '_base_/schedule_300e.py',
]
