backbone = dict(type='ELACeiT', layer_attention=dict(type='MRLALight', head_dim=16))
