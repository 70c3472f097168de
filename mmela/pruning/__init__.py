"""Which layer attentions are redundant: pure functions of KL divergences."""

from .divergence import attention_kl, safe_log
from .ebqm import EBQMResult, ebqm
from .policies import (
    EBQM,
    FixedCount,
    PruningPolicy,
    QuantileMapping,
    Threshold,
    build_policy,
)
from .record import LayerDecision, PruningDecision, PruningReport
from .registry import PRUNING_POLICIES

__all__ = [
    'EBQM',
    'EBQMResult',
    'FixedCount',
    'LayerDecision',
    'PRUNING_POLICIES',
    'PruningDecision',
    'PruningPolicy',
    'PruningReport',
    'QuantileMapping',
    'Threshold',
    'attention_kl',
    'build_policy',
    'ebqm',
    'safe_log',
]
