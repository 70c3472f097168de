"""Images that a network takes: their size and channels."""

import inspect
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn

Size = Tuple[int, int]

# Attribute of a network whose ``input_channels`` were given
GIVEN_CHANNELS = '_layer_attn_input_channels'


def sizes_to_try(network: nn.Module) -> List[Size]:
    """Sizes of images that a network names, and sizes that many take.

    Args:
        network (nn.Module): A network that takes images.

    Returns:
        list[tuple[int, int]]: Heights and widths. One of the network comes first:
        that of its parts, such as a patch embedding, before that of its
        pre-training.
    """
    modules = list(network.modules())
    named = [
        getattr(module, name, None)
        for name in ('img_size', 'input_size')
        for module in modules
    ]
    for name in ('pretrained_cfg', 'default_cfg'):
        cfg = getattr(network, name, None)
        # timm's; of a network that takes no other size
        if isinstance(cfg, dict) and cfg.get('fixed_input_size'):
            named.append(tuple(cfg['input_size'])[-2:])
    found = [size for size in map(_as_size, named) if size is not None]
    # Not square, as then height and width tell the axes of a map
    usual = [(224, 256), (224, 224), (256, 256), (384, 384), (512, 512), (32, 32)]
    return list(dict.fromkeys(found[:2] + usual))


def _as_size(value: Any) -> Optional[Size]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        if all(isinstance(side, int) and side >= 16 for side in value):
            return value[0], value[1]
    return None


def channels_to_try(network: nn.Module) -> List[int]:
    """Numbers of channels that the images of a network may have.

    Args:
        network (nn.Module): A network that takes images.

    Returns:
        list[int]: Those of its first convolution, those that it names, and 3.
    """
    found = [
        module.in_channels
        for module in network.modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    ][:1]
    for name in ('in_channels', 'in_chans', 'input_channels', 'num_channels'):
        value = getattr(network, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found.append(value)
    return list(dict.fromkeys([*found, 3]))


def input_channels(network: nn.Module) -> int:
    """Channels of the images that a network takes.

    Args:
        network (nn.Module): A network that takes images, or a model whose backbone
            does.

    Returns:
        int: Those that :func:`~mmela.attach_layer_attention` was given, or those of
        its first convolution, or else what it names, or 3.
    """
    for module in network.modules():
        if GIVEN_CHANNELS in vars(module):
            return vars(module)[GIVEN_CHANNELS]
    return channels_to_try(network)[0]


def other_arguments(network: nn.Module) -> List[None]:
    """What a network needs besides its image: None for each, such as a mask.

    Args:
        network (nn.Module): A network that takes images.

    Returns:
        list[None]: One for each further argument that has no default.
    """
    parameters = list(inspect.signature(network.forward).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY,)
    positional += (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    needed = [
        parameter
        for parameter in parameters[1:]
        if parameter.kind in positional and parameter.default is parameter.empty
    ]
    return [None] * len(needed)


def random_images(network: nn.Module, batch: int, channels: int, size: Size) -> Tensor:
    """Images for a trial, in device and data type of a network.

    Args:
        network (nn.Module): The network.
        batch (int): Number of images.
        channels (int): Their channels.
        size (tuple[int, int]): Height and width.

    Returns:
        Tensor: (B, C, H, W), the same in each call.
    """
    like = next(iter(network.parameters()), torch.empty(0))
    shape = (batch, channels, *size)
    if like.device.type == 'meta':
        return torch.empty(shape, device='meta', dtype=like.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    return x.to(like.device, like.dtype if like.is_floating_point() else None)
