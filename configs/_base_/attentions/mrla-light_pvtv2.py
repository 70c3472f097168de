# All blocks have attention here; in the plain config none does.
backbone = dict(layer_attention=dict(type='MRLALight', head_dim=16), blocks='auto')
