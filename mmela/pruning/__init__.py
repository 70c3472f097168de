"""Decide which layer attentions are redundant: pure functions of KL divergences."""

from .divergence import Divergence, attention_kl, safe_log, split_kl
from .ebqm import PooledDecision, ebqm
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
from .signal import deviation, has_learned

__all__ = [
    'Divergence',
    'EBQM',
    'FixedCount',
    'LayerDecision',
    'PooledDecision',
    'PRUNING_POLICIES',
    'PruningDecision',
    'PruningPolicy',
    'PruningReport',
    'QuantileMapping',
    'Threshold',
    'attention_kl',
    'build_policy',
    'deviation',
    'ebqm',
    'has_learned',
    'safe_log',
    'split_kl',
]
