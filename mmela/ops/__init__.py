from .layer_weighted_sum import (
    BACKENDS,
    SharedValue,
    check_backend,
    layer_weighted_sum,
    reference,
    share_value,
)
from .pool_and_convolve import pool_and_convolve

__all__ = [
    'BACKENDS',
    'SharedValue',
    'check_backend',
    'layer_weighted_sum',
    'pool_and_convolve',
    'reference',
    'share_value',
]
