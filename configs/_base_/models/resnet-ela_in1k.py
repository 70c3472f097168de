_base_ = ['./resnet-mrla-base_in1k.py', '../pruning/ela_in1k.py']
_deprecation_ = dict(expected='../pruning/ela_in1k.py')
