# Stochastic depth only for the attention, with survival probability 0.8 (MRLA,
# appendix B.1).
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

backbone = dict(
    type='ELAResNet', layer_attention=dict(type='MRLABase', head_dim=32, drop_path=0.2)
)
