# CIFAR-10 as image files with one folder per class, as `mmela cifar` writes it from an
# archive of images.
_base_ = './cifar10_bs128.py'

data_root = 'data/cifar10_folder'

# Files are decoded to BGR, but the statistics are for RGB.
data_preprocessor = dict(to_rgb=True)

train_pipeline = [dict(type='LoadImageFromFile'), *_base_.train_pipeline]
test_pipeline = [dict(type='LoadImageFromFile'), *_base_.test_pipeline]

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='test',
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
