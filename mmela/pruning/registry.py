from mmengine.registry import Registry

# Policies for mmela.hooks.LayerAttentionPruningHook
PRUNING_POLICIES = Registry('pruning policy', scope='mmela')
