# Starts from the weights of a plain network, with the setup of a detector's
# fine-tuning: stage 1 is frozen, and norms keep their statistics.
_base_ = '../cifar/resnet38_1xb128-10e_cifar10-16px.py'

model = dict(backbone=dict(frozen_stages=1, norm_eval=True))
