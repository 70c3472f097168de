from .decision_log_hook import DecisionLogHook
from .layer_attention_pruning_hook import LayerAttentionPruningHook
from .memory_format_hook import MemoryFormatHook, use_channels_last
from .meter import KLMeter, NetworkKLMeter

__all__ = [
    'DecisionLogHook',
    'KLMeter',
    'LayerAttentionPruningHook',
    'MemoryFormatHook',
    'NetworkKLMeter',
    'use_channels_last',
]
