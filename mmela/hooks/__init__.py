from .decide import decide
from .kl_meter import KLMeter, NetworkKLMeter
from .layer_attention_pruning_hook import LayerAttentionPruningHook, format_decisions

__all__ = [
    'KLMeter',
    'LayerAttentionPruningHook',
    'NetworkKLMeter',
    'decide',
    'format_decisions',
]
