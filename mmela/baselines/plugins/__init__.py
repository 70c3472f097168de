"""Attention modules as plugins of mmcv, for comparison with layer attention.

All are in MMEngine's ``MODELS`` and are built with ``in_channels``, so that
``plugins`` of MMDetection's backbones takes them as well as
:class:`mmela.layers.Plugin`.
"""

from .bam import BAM
from .double_attention import DoubleAttention
from .se import SqueezeExcitation
from .timm_modules import CBAM, ECA

__all__ = ['BAM', 'CBAM', 'DoubleAttention', 'ECA', 'SqueezeExcitation']
