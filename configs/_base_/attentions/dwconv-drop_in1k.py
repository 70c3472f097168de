# A depth-wise convolution with the stochastic depth of MRLA (MRLA, table 12, a).
_base_ = './dwconv_in1k.py'

backbone = dict(layer_attention=dict(drop_path=0.2))
