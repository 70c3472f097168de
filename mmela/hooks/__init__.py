from .functional import decide, layer_attention_stages, named_layer_attentions, prune
from .kl_meter import KLMeter, NetworkKLMeter
from .layer_attention_pruning_hook import LayerAttentionPruningHook, format_decisions

__all__ = [
    'KLMeter',
    'LayerAttentionPruningHook',
    'NetworkKLMeter',
    'decide',
    'format_decisions',
    'layer_attention_stages',
    'named_layer_attentions',
    'prune',
]
