# MRLA-light with lambda = 1 (MRLA, table 4, e).
_base_ = './mrla-light_in1k.py'

backbone = dict(layer_attention=dict(learn_lambda=False))
