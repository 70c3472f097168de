# MRLA-light without the previous output (MRLA, table 4, b).
_base_ = './mrla-light_in1k.py'

backbone = dict(layer_attention=dict(previous='none'))
