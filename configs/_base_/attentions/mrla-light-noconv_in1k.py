# MRLA-light whose value is the output itself (MRLA, table 4, c).
_base_ = './mrla-light_in1k.py'

backbone = dict(layer_attention=dict(value_conv=False))
