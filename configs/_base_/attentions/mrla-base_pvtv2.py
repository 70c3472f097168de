# In all blocks; the plain config has it in none.
backbone = dict(
    layer_attention=dict(type='MRLABase', head_dim=16), attention_blocks=None
)
