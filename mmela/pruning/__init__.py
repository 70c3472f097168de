"""Which layer attentions are redundant: pure functions of KL divergences."""

from .divergence import attention_kl, safe_log
from .ebqm import EBQMResult, ebqm
from .policies import (
    EBQM,
    FixedCount,
    PruningDecision,
    PruningPolicy,
    QuantileMapping,
    Threshold,
)
from .registry import PRUNING_POLICIES

__all__ = [
    'EBQM',
    'EBQMResult',
    'FixedCount',
    'PRUNING_POLICIES',
    'PruningDecision',
    'PruningPolicy',
    'QuantileMapping',
    'Threshold',
    'attention_kl',
    'ebqm',
    'safe_log',
]
