# All of CIFAR-10 with the papers' ResNet-20 and a one-cycle schedule. It uses bfloat16,
# which halves the step time on a CPU that supports it.
_base_ = [
    '../../_base_/models/resnet20_cifar.py',
    '../../_base_/datasets/cifar10-folder_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(
    imports=['mmela', 'mmela.engine.cpu_bfloat16'], allow_failed_imports=False
)

train_dataloader = dict(num_workers=1, drop_last=True)
val_dataloader = dict(num_workers=1)
test_dataloader = val_dataloader

optim_wrapper = dict(
    type='CPUBFloat16OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
)
param_scheduler = [
    dict(
        type='OneCycleLR',
        eta_max=0.2,
        pct_start=0.25,
        total_steps=9,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
train_cfg = dict(by_epoch=True, max_epochs=9, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(interval=65),
    memory_format=dict(type='MemoryFormatHook', module=''),
)
