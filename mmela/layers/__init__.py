"""Layer attentions and the stages that run them."""

from .attn_res import AttnRes
from .base import LayerAttention, QKVLayerAttention, StageMemory
from .dla import DLABase, DLALight
from .kcla import KCLA
from .linearized import LinearizedMLA
from .mla import MLA
from .mrla_base import MRLABase
from .mrla_light import MRLALight
from .state import AttentionState

__all__ = [
    'KCLA',
    'MLA',
    'AttentionState',
    'AttnRes',
    'DLABase',
    'DLALight',
    'LayerAttention',
    'LinearizedMLA',
    'MRLABase',
    'MRLALight',
    'QKVLayerAttention',
    'StageMemory',
]
