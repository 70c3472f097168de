# MRLA-light with fully connected query and key (MRLA, table 4, d). The paper does
# not say how wide they are; a sixteenth has its parameters.
_base_ = './mrla-light_in1k.py'

backbone = dict(layer_attention=dict(fc_reduction=16))
