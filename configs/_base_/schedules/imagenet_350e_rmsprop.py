# EfficientNet's schedule, scaled to a batch of 768 as for MRLA (appendix B.1):
# 350 epochs, lr 0.048, multiplied by 0.97 every 2.4 epochs.
optim_wrapper = dict(
    optimizer=dict(
        type='RMSprop', lr=0.048, alpha=0.9, momentum=0.9, eps=1e-3, weight_decay=4e-5
    )
)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
    # 0.97^(1/2.4) per epoch
    dict(type='ExponentialLR', by_epoch=True, gamma=0.97 ** (1 / 2.4), begin=5),
]

train_cfg = dict(by_epoch=True, max_epochs=350, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=768)
