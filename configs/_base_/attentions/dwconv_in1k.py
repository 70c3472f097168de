# Only a depth-wise convolution, without stochastic depth (MRLA, tables 4, g and
# 12, a).
_base_ = './mrla-light-none_in1k.py'

backbone = dict(layer_attention=dict(gate=False, drop_path=0.0))
