from mmengine.registry import Registry

PRUNING_POLICIES = Registry('pruning policy', scope='mmela')
"""Policies that :class:`mmela.hooks.LayerAttentionPruningHook` can be given."""
