import math
from typing import List, Optional

import torch
import torch.nn as nn
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor

from ..ops import layer_weighted_sum
from .base import LayerAttention, LayerMemory, eca_kernel_size


@MODELS.register_module()
class MRLABase(LayerAttention):
    r"""MRLA-base: multi-head recurrent layer attention (MRLA, eq. 6 and 9).

    Block ``t`` asks the keys that it and the earlier blocks of its stage have
    left in the memory, and sums their values:

    .. math::
        a^t = \mathrm{softmax}_{s \le t}(q^t \cdot k^s / \sqrt d), \quad
        O^t = \sum_{s \le t} a^t_s V^s, \quad
        Y^t = X^t + \mathrm{DropPath}(\mathrm{ReLU}(\mathrm{BN}(O^t)))

    Query and key are 1-D convolutions over the channels of the pooled ``X^t``,
    the value is a depth-wise 3x3 convolution of ``X^t``.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head; 32 for ImageNet and COCO
            ResNets, 16 for CIFAR (MRLA, section 5.1). Defaults to 32.
        drop_path (float): Probability of dropping the attention of a sample
            in training. Defaults to 0.
        norm_cfg (dict): Normalization of ``O^t``. Defaults to
            ``dict(type='BN')``.
        zero_init (bool): Start with a normalization weight of 0, so that the
            block's output is at first that of the plain residual block. For
            networks that start from the weights of a plain ResNet. Defaults to
            False.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: If ``channels`` is no multiple of ``head_dim`` or
            ``drop_path`` is not in [0, 1).
    """

    prunable = True

    def __init__(self,
                 channels: int,
                 head_dim: int = 32,
                 drop_path: float = 0.,
                 norm_cfg: dict = dict(type='BN'),
                 zero_init: bool = False,
                 init_cfg: Optional[dict] = None) -> None:
        super().__init__(channels, head_dim, init_cfg)
        if not 0 <= drop_path < 1:
            raise ValueError(
                f'drop_path={drop_path} is not a probability in [0, 1)')
        self.zero_init = zero_init
        size = eca_kernel_size(channels)
        self.query = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.key = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.value = nn.Conv2d(
            channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.query.reset_parameters()
        self.key.reset_parameters()
        # Published: Kaiming over the fan-out without regard to the groups; the
        # norm corrects the scale. In a pre-trained detector the norm is often
        # evaluated with its initial statistics and corrects nothing, so there
        # the true fan of a depth-wise convolution counts.
        fan_out = 9 if self.zero_init else 9 * self.channels
        nn.init.normal_(self.value.weight, std=math.sqrt(2 / fan_out))
        nn.init.constant_(self.norm.weight, 0. if self.zero_init else 1.)
        nn.init.constant_(self.norm.bias, 0.)

    def init_weights(self) -> None:
        """Initialize the weights, after those that a parent set by type."""
        if self.init_cfg:
            super().init_weights()
        else:
            self.reset_parameters()
            self._is_init = True

    def retained_parameters(self) -> List[str]:
        return ['key.weight', 'value.weight']

    def store(self, x: Tensor, memory: LayerMemory) -> None:
        self._store(x, x.mean((2, 3)).unsqueeze(1), memory)

    def _store(self, x: Tensor, pooled: Tensor, memory: LayerMemory) -> None:
        memory.keys.append(self._split(self.key(pooled)))
        memory.values.append(self.value(x))

    def _split(self, y: Tensor) -> Tensor:
        """(B, 1, C) to (B, G, d), in at least single precision."""
        y = y.view(-1, self.num_heads, self.head_dim)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def attend(self, x: Tensor, memory: LayerMemory) -> Tensor:
        pooled = x.mean((2, 3)).unsqueeze(1)
        self._store(x, pooled, memory)
        query = self._split(self.query(pooled)).unsqueeze(2)
        keys = torch.stack(memory.keys, dim=2)
        # A product and a sum, not a matmul, which autocast would do in half
        scores = (query * keys).sum(-1) / math.sqrt(self.head_dim)
        memory.scores.append(scores)

        attn = scores.softmax(-1).to(memory.values[-1].dtype)
        out = self.norm(layer_weighted_sum(attn, memory.values))
        # ReLU, but with gradient 1 at 0: with zero_init all of `out` is 0, and
        # the gradient 0 of F.relu there would keep it so for ever.
        out = out.clamp_min(0)
        return x + self.drop_path(out)
