# Head width, and stochastic depth only for the attention, as in the KCLA paper
# (section V-A).
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet', layer_attention=dict(type='KCLA', head_dim=32, drop_path=0.2)
)
