# Goes on from the weights of a plain network, output-identical at first. Norms train,
# but for those of stage 1, which is frozen and so has no attention.
_base_ = './resnet38-attn-res_1xb128-10e_cifar10-16px.py'

model = dict(
    backbone=dict(frozen_stages=1, layer_attention=dict(total='sum', zero_init=True))
)
