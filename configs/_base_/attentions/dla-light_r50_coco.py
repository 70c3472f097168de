# DLA-L with the cells of its authors' detectors, a twentieth as wide; those of their
# classifiers, and of ours, are a sixteenth. So the detector starts from the classifier
# with the same attention, which is trained first:
# tools/train.py configs/imagenet/resnet50-dla-light_8xb32_in1k.py
# and its cells, whose shapes differ, from random weights, as mmengine then logs.
_base_ = './dla-light_in1k.py'

backbone = dict(
    layer_attention=dict(reduction=20),
    init_cfg=dict(
        checkpoint='work_dirs/resnet50-dla-light_8xb32_in1k/epoch_100.pth',
        prefix='backbone.',
    ),
)
