# zero_init, because the checkpoint comes from a plain ResNet. head_dim is as in the
# authors' detectors.
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet', layer_attention=dict(type='KCLA', head_dim=64, zero_init=True)
)

randomness = dict(seed=42)  # KCLA, section V
