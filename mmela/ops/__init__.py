from .compile import CompiledForward
from .depth_mixture import depth_mixture
from .layer_weighted_sum import (
    BACKENDS,
    check_backend,
    is_compiling,
    layer_weighted_sum,
    per_channel,
)
from .normed_sum import can_norm_sum, normed_sum

__all__ = [
    'BACKENDS',
    'CompiledForward',
    'can_norm_sum',
    'check_backend',
    'depth_mixture',
    'is_compiling',
    'layer_weighted_sum',
    'normed_sum',
    'per_channel',
]
