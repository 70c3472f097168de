# Attention-augmented convolutions in stages 2 to 4 (Bello et al. 2019, section 4.3).
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet',
    layer_attention=dict(type='AA'),
    blocks=[[], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2]],
)
