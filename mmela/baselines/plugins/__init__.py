"""Attention modules as plugins of mmcv, for comparison with layer attention.

They are registered in MMEngine's ``MODELS`` and take ``in_channels``, so both
``plugins`` of MMDetection's backbones and :class:`mmela.baselines.Plugin` can use them.
"""

from .bam import BAM
from .double_attention import DoubleAttention
from .se import SqueezeExcitation
from .timm_modules import CBAM, ECA

__all__ = ['BAM', 'CBAM', 'DoubleAttention', 'ECA', 'SqueezeExcitation']
