# MMPretrain's SE-ResNet for comparison. Its checkpoint was trained by MMPretrain, not
# by the papers' authors.
custom_imports = dict(imports=['mmpretrain.models'], allow_failed_imports=False)

backbone = dict(
    type='mmpretrain.SEResNet',
    init_cfg=dict(
        checkpoint='https://download.openmmlab.com/mmclassification/v0/se-resnet/'
        'se-resnet101_batch256_imagenet_20200804-ba5b51d4.pth',
        prefix='backbone.',
    ),
)
