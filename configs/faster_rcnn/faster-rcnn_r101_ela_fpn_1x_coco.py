_base_ = [
    './faster-rcnn_r101_mrla-base_fpn_1x_coco.py',
    '../_base_/pruning/ela_coco.py',
]
