# For configs that define their own ELAResNet.
_base_ = './pruning/ela_coco.py'
custom_imports = dict(imports=['mmela'], allow_failed_imports=False)
