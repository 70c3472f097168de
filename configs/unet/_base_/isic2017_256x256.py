_base_ = './lesions_256x256.py'
data_root = 'data/isic2017'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
