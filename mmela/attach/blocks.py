"""A block that an attention can follow: what families say and discovery finds."""

from dataclasses import dataclass, field
from typing import Any, Optional, Tuple

from torch import nn

from ..layers.features import Features


@dataclass
class Block:
    """A module that a layer attention can follow.

    Attributes:
        name (str): Its name in the network.
        module (nn.Module): The module.
        channels (int): Channels of its output.
        features (Features): Where the features are in its output. Defaults to maps
            (B, C, H, W) that are the output itself.
        inputs (tuple): Path to the features in its arguments. Defaults to (0,).
        stride (int): By how much the features are smaller than those of the block
            before. Defaults to 1.
        same_input (bool): Whether its input has the shape of its output. Defaults
            to True.
        shortcut (str, optional): Name, in the block, of the module that brings its
            input to the shape of its output. Defaults to None.
        follows (bool): Whether its input is computed from the output of the block
            before. Defaults to True.
        changes_input (bool): Whether it writes into its input. Defaults to False.
        own_drop_path (bool): Whether its attention has the stochastic depth that
            its config gives, and not that of the block (MRLA, section 5.1 and
            appendix B.1): so it is in ResNets. Defaults to False.
        tells_size (nn.Module, optional): The module that tells the size of the map
            that tokens are of. Defaults to None.
        shape (tuple[int, ...], optional): Of its output in the trial, batch size
            first. Defaults to None: there was none.
        size (tuple[int, int], optional): Height and width of that. Defaults to
            None.
    """

    name: str
    module: nn.Module
    channels: int
    features: Features = field(default_factory=Features)
    inputs: Tuple[Any, ...] = (0,)
    stride: int = 1
    same_input: bool = True
    shortcut: Optional[str] = None
    follows: bool = True
    changes_input: bool = False
    own_drop_path: bool = False
    tells_size: Optional[nn.Module] = None
    shape: Optional[Tuple[int, ...]] = None
    size: Optional[Tuple[int, int]] = None


def same_features(one: Block, other: Block) -> bool:
    """Whether the outputs of two blocks can be attended over together.

    Args:
        one (Block): A block.
        other (Block): Another one.

    Returns:
        bool: True if they have one layout, width and resolution.
    """
    return (one.features.layout, one.shape, one.features.extra, one.channels) == (
        other.features.layout,
        other.shape,
        other.features.extra,
        other.channels,
    )
