# Double attention in five blocks (A2-Nets, section 4.2).
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet',
    layer_attention=dict(
        type='Plugin', plugin=dict(type='DoubleAttention', reduction=2)
    ),
    blocks=[[], [1, 3], [1, 3, 5], []],
)
