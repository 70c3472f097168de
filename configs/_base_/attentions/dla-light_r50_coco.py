# DLA-L with the cells of its authors' detectors, which are a twentieth as wide as the
# block; in their classifiers, and in ours, cells are a sixteenth as wide. The detector
# starts from a classifier with the same attention; train it first:
# tools/train.py configs/imagenet/resnet50-dla-light_8xb32_in1k.py
# The cells start from random weights, because their shapes differ. mmengine logs that.
_base_ = './dla-light_in1k.py'

backbone = dict(
    layer_attention=dict(reduction=20),
    init_cfg=dict(
        checkpoint='work_dirs/resnet50-dla-light_8xb32_in1k/epoch_100.pth',
        prefix='backbone.',
    ),
)
