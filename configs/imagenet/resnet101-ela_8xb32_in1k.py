_base_ = ['./resnet101-mrla-base_8xb32_in1k.py', '../_base_/pruning/ela_in1k.py']
