from .compile import CompiledForward
from .depth_mixture import (
    add_scaled,
    added_since,
    changes_of,
    depth_mixture,
    depth_scores,
    inverse_rms,
)
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
    'add_scaled',
    'added_since',
    'can_norm_sum',
    'changes_of',
    'check_backend',
    'depth_mixture',
    'depth_scores',
    'inverse_rms',
    'is_compiling',
    'layer_weighted_sum',
    'normed_sum',
    'per_channel',
]
