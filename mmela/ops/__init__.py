from .layer_weighted_sum import (BACKENDS, SharedValue, check_backend,
                                 layer_weighted_sum, reference, share_value)

__all__ = [
    'BACKENDS', 'SharedValue', 'check_backend', 'layer_weighted_sum',
    'reference', 'share_value'
]
