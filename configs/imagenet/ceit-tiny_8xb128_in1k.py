# DeiT's recipe, as in MRLA (appendix B.1).
_base_ = './deit-tiny_8xb128_in1k.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type='CeiT', arch='tiny', drop_path_rate=0.1))
