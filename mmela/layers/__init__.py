from . import plugins
from .augmented_conv import AA
from .ba import BA
from .base import AttentionState, LayerAttention, QKVLayerAttention, StageMemory
from .branch import BranchAttention, Plugin
from .dia import DIA
from .dla import DLABase, DLALight
from .kcla import KCLA
from .linearized import LinearizedMLA
from .mla import MLA
from .mrla_base import MRLABase
from .mrla_light import MRLALight
from .rla_g import RLAg
from .stages import (
    AttentionStage,
    HookedAttentionStage,
    SequentialAttentionStage,
    TokenAttentionStage,
    forward_pass,
)

__all__ = [
    'AA',
    'BA',
    'DIA',
    'KCLA',
    'MLA',
    'AttentionStage',
    'AttentionState',
    'BranchAttention',
    'DLABase',
    'DLALight',
    'HookedAttentionStage',
    'LayerAttention',
    'LinearizedMLA',
    'MRLABase',
    'MRLALight',
    'Plugin',
    'QKVLayerAttention',
    'RLAg',
    'SequentialAttentionStage',
    'StageMemory',
    'TokenAttentionStage',
    'forward_pass',
    'plugins',
]
