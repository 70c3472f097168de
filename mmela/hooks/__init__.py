from .layer_attention_pruning_hook import LayerAttentionPruningHook
from .meter import KLMeter, NetworkKLMeter

__all__ = ['KLMeter', 'LayerAttentionPruningHook', 'NetworkKLMeter']
