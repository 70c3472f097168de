"""Attach layer attentions to a network.

``families`` names the blocks of known backbones, ``discovery`` finds those of any
other network by watching one forward pass, ``wiring`` builds and attaches.
"""

from .inputs import input_channels, other_arguments, random_images, sizes_to_try
from .wiring import attach_layer_attention, with_layer_attention

__all__ = [
    'attach_layer_attention',
    'input_channels',
    'other_arguments',
    'random_images',
    'sizes_to_try',
    'with_layer_attention',
]
