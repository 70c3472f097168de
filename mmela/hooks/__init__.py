from .kl_meter import KLMeter, NetworkKLMeter
from .layer_attention_pruning_hook import (LayerAttentionPruningHook,
                                           layer_attention_stages,
                                           named_layer_attentions)

__all__ = [
    'KLMeter', 'LayerAttentionPruningHook', 'NetworkKLMeter',
    'layer_attention_stages', 'named_layer_attentions'
]
