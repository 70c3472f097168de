from .layer_weighted_sum import (
    BACKENDS,
    check_backend,
    is_compiling,
    layer_weighted_sum,
)

__all__ = [
    'BACKENDS',
    'check_backend',
    'is_compiling',
    'layer_weighted_sum',
]
