_base_ = ['./retinanet_r50_mrla-base_fpn_1x_coco.py', '../_base_/pruning/ela_coco.py']
