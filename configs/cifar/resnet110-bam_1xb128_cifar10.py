_base_ = ['./resnet110_1xb128_cifar10.py', '../_base_/attentions/bam_cifar.py']

model = dict(backbone=_base_.backbone)
