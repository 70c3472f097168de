# Trains on a laptop's CPU in about a minute, on the images of
# `mmela lesions render data/lesions`.
_base_ = ['unet_r18_kcla_kvasir-256x256.py']
data_root = 'data/lesions'
# The images are rendered at this size.
train_pipeline = [step for step in _base_.train_pipeline if step['type'] != 'Resize']
test_pipeline = [step for step in _base_.test_pipeline if step['type'] != 'Resize']
train_dataloader = dict(
    num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
val_dataloader = dict(
    num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline)
)
test_dataloader = val_dataloader

param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        T_max=6,
        eta_min=1e-5,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
train_cfg = dict(max_epochs=6, val_interval=2)
default_hooks = dict(logger=dict(interval=4), checkpoint=dict(interval=2))
