# Only a depth-wise convolution after each layer (MRLA, table 11).
_base_ = './mrla-light_deit.py'

backbone = dict(layer_attention=dict(previous='none', gate=False, value_act_cfg=None))
