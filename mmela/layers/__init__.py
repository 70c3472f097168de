from .base import AttentionState, LayerAttention, QKVLayerAttention, StageMemory
from .kcla import KCLA
from .mla import MLA
from .mrla_base import MRLABase
from .mrla_light import MRLALight
from .stages import (
    AttentionStage,
    HookedAttentionStage,
    SequentialAttentionStage,
    TokenAttentionStage,
    forward_pass,
)

__all__ = [
    'KCLA',
    'MLA',
    'AttentionStage',
    'AttentionState',
    'HookedAttentionStage',
    'LayerAttention',
    'MRLABase',
    'MRLALight',
    'QKVLayerAttention',
    'SequentialAttentionStage',
    'StageMemory',
    'TokenAttentionStage',
    'forward_pass',
]
