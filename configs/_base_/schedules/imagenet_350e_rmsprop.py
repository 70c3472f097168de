# EfficientNet's schedule, scaled to a batch of 768 as for MRLA (appendix B.1):
# 350 epochs with lr 0.048, multiplied by 0.97 every 2.4 epochs. As in timm, which the
# authors train with, these are counted from epoch 0 and take effect with the next
# epoch. The warm-up of 5 epochs is EfficientNet's; MRLA's text mentions none.
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
    dict(
        type='MultiStepLR',
        by_epoch=True,
        # 2.4 k, rounded up; steps during the warm-up move to its end
        milestones=[max(5, -(-12 * k // 5)) for k in range(1, 146)],
        gamma=0.97,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=350, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=768)
