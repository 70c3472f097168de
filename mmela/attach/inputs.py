"""The size and channels of the images that a network takes."""

import inspect
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn

Size = Tuple[int, int]

# Attribute of a network for which the user set ``input_channels``
GIVEN_CHANNELS = '_layer_attn_input_channels'


def sizes_to_try(network: nn.Module) -> List[Size]:
    """List image sizes to try: those that the network declares, then common ones.

    Args:
        network (nn.Module): A network that takes images.

    Returns:
        list[tuple[int, int]]: Heights and widths. Sizes that modules declare, such
        as a patch embedding, come before the size of the pre-training.
    """
    modules = list(network.modules())
    named = [
        getattr(module, name, None)
        for name in ('img_size', 'input_size')
        for module in modules
    ]
    for name in ('pretrained_cfg', 'default_cfg'):
        cfg = getattr(network, name, None)
        # timm sets it for networks that take no other size
        if isinstance(cfg, dict) and cfg.get('fixed_input_size'):
            named.append(tuple(cfg['input_size'])[-2:])
    declared = [size for size in map(_as_size, named) if size is not None]
    # Not square at first, so that height and width identify the axes of a map
    common = [(224, 256), (224, 224), (256, 256), (384, 384), (512, 512), (32, 32)]
    return list(dict.fromkeys(declared[:2] + common))


def _as_size(value: Any) -> Optional[Size]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        if all(isinstance(side, int) and side >= 16 for side in value):
            return value[0], value[1]
    return None


def channels_to_try(network: nn.Module) -> List[int]:
    """List numbers of image channels to try.

    Args:
        network (nn.Module): A network that takes images.

    Returns:
        list[int]: The channels of its first convolution, those that it declares,
        and 3.
    """
    candidates = [
        module.in_channels
        for module in network.modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    ][:1]
    for name in ('in_channels', 'in_chans', 'input_channels', 'num_channels'):
        value = getattr(network, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            candidates.append(value)
    return list(dict.fromkeys([*candidates, 3]))


def input_channels(network: nn.Module) -> int:
    """Channels of the images that a network takes.

    Args:
        network (nn.Module): A network that takes images, or a model whose backbone
            does.

    Returns:
        int: The ``input_channels`` given to
        :func:`~mmela.attach_layer_attention`, or else the channels of the first
        convolution, or else what the network declares, or else 3.
    """
    for module in network.modules():
        if GIVEN_CHANNELS in vars(module):
            return vars(module)[GIVEN_CHANNELS]
    return channels_to_try(network)[0]


def other_arguments(network: nn.Module) -> List[None]:
    """None for every argument that a network needs besides its image, such as a mask.

    Args:
        network (nn.Module): A network that takes images.

    Returns:
        list[None]: One for each further argument without a default.
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
    """Draw images for a trial, with the device and dtype of a network.

    Args:
        network (nn.Module): The network.
        batch (int): Number of images.
        channels (int): Their channels.
        size (tuple[int, int]): Height and width.

    Returns:
        Tensor: (B, C, H, W), the same in every call.
    """
    like = next(iter(network.parameters()), torch.empty(0))
    shape = (batch, channels, *size)
    if like.device.type == 'meta':
        return torch.empty(shape, device='meta', dtype=like.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    return x.to(like.device, like.dtype if like.is_floating_point() else None)
