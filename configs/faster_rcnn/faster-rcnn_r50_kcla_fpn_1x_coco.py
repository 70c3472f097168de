_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/attentions/kcla_coco.py',
]

model = dict(backbone=_base_.backbone)

# 8 images on 2 GPUs (KCLA, section V-B). The learning rate is scaled with the batch
# size as in the text, which however prints ten times that, 0.1.
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
