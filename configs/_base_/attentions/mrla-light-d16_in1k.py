# MRLA-light with other heads (MRLA, table 4, f).
_base_ = './mrla-light_in1k.py'

backbone = dict(layer_attention=dict(head_dim=16))
