_base_ = ['./resnet56_1xb128_cifar10.py', '../_base_/attentions/kcla_cifar.py']

model = dict(backbone=_base_.backbone)
randomness = dict(seed=42)  # KCLA, section V
