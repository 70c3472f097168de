# Global context blocks in stages 2 to 4, MMDetection's own config.
_base_ = 'mmdet::gcnet/mask-rcnn_r101-gcb-r4-c3-c5_fpn_1x_coco.py'
