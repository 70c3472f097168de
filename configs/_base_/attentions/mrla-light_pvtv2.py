# In all blocks; the plain config has it in none.
backbone = dict(layer_attention=dict(type='MRLALight', head_dim=16), blocks='auto')
