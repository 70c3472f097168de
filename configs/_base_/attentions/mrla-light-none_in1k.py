# MRLA-light without what was before (MRLA, table 4, b).
_base_ = './mrla-light_in1k.py'

backbone = dict(layer_attention=dict(previous='none'))
