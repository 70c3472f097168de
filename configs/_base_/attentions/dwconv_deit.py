# A depth-wise convolution alone (MRLA, table 11), after each layer.
_base_ = './mrla-light_deit.py'

backbone = dict(layer_attention=dict(previous='none', gate=False, value_act_cfg=None))
