"""Where layer attentions go in a network, and giving them to it.

Families say where they go in backbones that are known, discovery finds it by one
watched forward pass in all others, and wiring builds and attaches them.
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
