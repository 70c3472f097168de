from .base import AttentionState, LayerAttention, LayerMemory
from .mrla_base import MRLABase
from .stage import LayerAttentionStage

__all__ = [
    'AttentionState', 'LayerAttention', 'LayerAttentionStage', 'LayerMemory',
    'MRLABase'
]
