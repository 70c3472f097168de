# One global context block at the place of the non-local block (GCNet, ratio 1/16).
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet',
    layer_attention=dict(type='Plugin', plugin=dict(type='ContextBlock', ratio=1 / 16)),
    blocks=[[], [], [4], []],
)
