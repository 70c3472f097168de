# One non-local block, in the last but one block of stage 3 (Wang et al. 2018).
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet',
    layer_attention=dict(type='Plugin', plugin=dict(type='NonLocal2d', reduction=2)),
    blocks=[[], [], [4], []],
)
