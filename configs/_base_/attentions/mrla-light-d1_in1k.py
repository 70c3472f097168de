# MRLA-light with one head per channel, CRLA (MRLA, table 4, f).
_base_ = './mrla-light_in1k.py'

backbone = dict(layer_attention=dict(head_dim=1))
