"""The version of mmela, and the versions of other packages that it supports."""

__version__ = '0.2.0'

# package: (first supported version, first unsupported version)
SUPPORTED = {
    'torch': ('2.0.0', '3.0.0'),
    'mmengine': ('0.10.0', '1.0.0'),
    'mmcv': ('2.0.0', '3.0.0'),
    'mmdet': ('3.0.0', '4.0.0'),
    'mmpretrain': ('1.0.0', '2.0.0'),
    'mmseg': ('1.0.0', '2.0.0'),
}

# Import name: distributions that provide it. OpenMMLab's wheel comes first, the
# community's fork last. Two of them in one environment overwrite each other's files.
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv-lite', 'mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
}
