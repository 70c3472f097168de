# MRLA-light with fully connected query and key (MRLA, table 4, d). The paper does
# not give their width; a sixteenth matches its number of parameters.
_base_ = './mrla-light_in1k.py'

backbone = dict(layer_attention=dict(fc_reduction=16))
