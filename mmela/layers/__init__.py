from .base import AttentionState, LayerAttention, LayerMemory
from .hooked_stage import HookedAttentionStage, TokenAttentionStage
from .kcla import KCLA
from .mla import MLA
from .mrla_base import MRLABase
from .mrla_light import MRLALight
from .qkv import QKVLayerAttention
from .stage import LayerAttentionStage

__all__ = [
    'AttentionState',
    'HookedAttentionStage',
    'KCLA',
    'LayerAttention',
    'LayerAttentionStage',
    'LayerMemory',
    'MLA',
    'MRLABase',
    'MRLALight',
    'QKVLayerAttention',
    'TokenAttentionStage',
]
