# Goes on from the weights of a plain network under the conditions of a
# detector's fine-tuning: stage 1 frozen, the statistics of the norms kept.
_base_ = '../cifar/resnet38_1xb128-10e_cifar10-16px.py'

model = dict(backbone=dict(frozen_stages=1, norm_eval=True))
