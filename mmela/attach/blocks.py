"""A block that an attention can follow, as families and discovery describe it."""

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
        features (Features): Where its output holds the features. Defaults to an
            output that is a map (B, C, H, W).
        inputs (tuple): Path to the features in its arguments. Defaults to (0,).
        stride (int): Factor by which the features are smaller than those of the
            previous block. Defaults to 1.
        same_input (bool): Whether its input has the shape of its output. Defaults
            to True.
        shortcut (str, optional): Name, in the block, of the module that brings its
            input to the shape of its output. Defaults to None.
        follows (bool): Whether its input depends on the output of the previous
            block. Defaults to True.
        changes_input (bool): Whether it writes into its input. Defaults to False.
        own_drop_path (bool): Whether only the config sets the stochastic depth of
            its attention, and not the rate of the block. True in ResNets (MRLA,
            section 5.1 and appendix B.1). Defaults to False.
        tells_size (nn.Module, optional): The module that returns the size of the
            map behind the tokens. Defaults to None.
        shape (tuple[int, ...], optional): Shape of its output in the trial, batch
            size first. Defaults to None: there was no trial.
        size (tuple[int, int], optional): Height and width of that output. Defaults
            to None.
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
    """Whether two blocks can be in one stage.

    Args:
        one (Block): A block.
        other (Block): Another one.

    Returns:
        bool: True if their outputs have the same layout, width and resolution.
    """
    return (one.features.layout, one.shape, one.features.extra, one.channels) == (
        other.features.layout,
        other.shape,
        other.features.extra,
        other.channels,
    )
