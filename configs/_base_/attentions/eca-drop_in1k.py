# ECA with the stochastic depth of MRLA (MRLA, table 12, c); needs timm.
_base_ = './eca_in1k.py'

backbone = dict(layer_attention=dict(drop_path=0.2))
