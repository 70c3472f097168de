import math
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from ..ops import pool_and_convolve
from .base import LayerAttention, channel_conv


class QKVLayerAttention(LayerAttention):
    """A layer attention with the transforms of MRLA (section 4.1).

    Query and key are 1-D convolutions over the channels of the pooled block
    output ``X^t``, the value is a depth-wise 3x3 convolution of ``X^t``. A
    subclass says in :meth:`retrieve` how they are put together.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head; 32 for ImageNet and COCO
            ResNets, 16 for CIFAR and transformers, 8 for EfficientNet (MRLA,
            section 5.1). Defaults to 32.
        drop_path (float): Probability of dropping the attention of a sample
            in training. Defaults to 0.
        norm_cfg (dict, optional): Normalization of what is retrieved; None
            for none. Defaults to ``dict(type='BN')``.
        value_act_cfg (dict, optional): Activation of the value. Defaults to
            None, which means none.
        zero_init (bool): Start with a normalization weight of 0, so that the
            block's output is at first that of the plain residual block. For
            networks that start from the weights of a plain ResNet. Defaults to
            False.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: If ``channels`` is no multiple of ``head_dim``,
            ``drop_path`` is not in [0, 1), or ``zero_init`` is set without a
            normalization.
    """

    adds_in_place = True

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        drop_path: float = 0.0,
        norm_cfg: Optional[dict] = dict(type='BN'),
        value_act_cfg: Optional[dict] = None,
        zero_init: bool = False,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(channels, head_dim, init_cfg)
        if not 0 <= drop_path < 1:
            raise ValueError(f'drop_path={drop_path} is not a probability in [0, 1)')
        if zero_init and norm_cfg is None:
            raise ValueError(
                'zero_init=True sets the weight of the '
                'normalization to 0, but norm_cfg=None has none'
            )
        self.zero_init = zero_init
        self.query = channel_conv(channels)
        self.key = channel_conv(channels)
        self.value = nn.Conv2d(
            channels, channels, 3, padding=1, groups=channels, bias=False
        )
        self.value_act = (
            build_activation_layer(value_act_cfg) if value_act_cfg else nn.Identity()
        )
        self.norm = (
            build_norm_layer(norm_cfg, channels)[1] if norm_cfg else nn.Identity()
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.query.reset_parameters()
        self.key.reset_parameters()
        # Published: Kaiming over the fan-out without regard to the groups; the
        # norm corrects the scale. In a pre-trained detector the norm is often
        # evaluated with its initial statistics and corrects nothing, so there
        # the true fan of a depth-wise convolution counts. So it does where
        # there is no norm.
        bare = self.zero_init or isinstance(self.norm, nn.Identity)
        fan_out = 9 if bare else 9 * self.channels
        nn.init.normal_(self.value.weight, std=math.sqrt(2 / fan_out))
        if not isinstance(self.norm, nn.Identity):
            nn.init.constant_(self.norm.weight, 0.0 if self.zero_init else 1.0)
            nn.init.constant_(self.norm.bias, 0.0)

    def init_weights(self) -> None:
        """Initialize the weights, after those that a parent set by type."""
        if self.init_cfg:
            super().init_weights()
        else:
            self.reset_parameters()
            self._is_init = True

    @staticmethod
    def _pool(x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 1, C): global average pooling."""
        return x.mean((2, 3)).unsqueeze(1)

    def _split(self, y: Tensor) -> Tensor:
        """(B, 1, C) to (B, G, d), in at least single precision."""
        y = y.view(-1, self.num_heads, self.head_dim)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def _value(self, x: Tensor) -> Tensor:
        return self.value_act(self.value(x))

    def _pool_and_value(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """:meth:`_pool` and :meth:`_value` of the same input."""
        pooled, value = pool_and_convolve(x, self.value.weight)
        return pooled.unsqueeze(1), self.value_act(value)

    def _per_channel(self, weight: Tensor, x: Tensor) -> Tensor:
        """(B, G) to (B, C, 1, 1), in the dtype of ``x``."""
        weight = weight.repeat_interleave(self.head_dim, dim=1)
        return weight[..., None, None].to(x.dtype)

    def _normalize(self, out: Tensor) -> Tensor:
        """DropPath(ReLU(BN(out))), the last steps of all but MRLA-light."""
        out = self.norm(out)
        if not isinstance(self.norm, nn.Identity):
            # ReLU, but with gradient 1 at 0: with zero_init all of `out` is 0,
            # and the gradient 0 of F.relu there would keep it so for ever. No
            # clamp_min, whose backward pass is five times as slow on a CPU.
            out = F.threshold(out, _just_below_zero(out.dtype), 0.0)
        return self.drop_path(out)


def _just_below_zero(dtype: torch.dtype) -> float:
    """A negative number that ``dtype`` tells from 0 and no result reaches."""
    if dtype == torch.float16:
        return -(2.0**-24)  # its smallest normal number is not that small
    return -torch.finfo(dtype).smallest_normal
