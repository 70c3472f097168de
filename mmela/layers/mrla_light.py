import math
from typing import Optional

import torch
import torch.nn as nn
from mmengine.registry import MODELS
from torch import Tensor

from .base import LayerMemory
from .qkv import QKVLayerAttention


@MODELS.register_module(force=True)  # instead of its placeholder
class MRLALight(QKVLayerAttention):
    r"""MRLA-light: layer attention at linear cost (MRLA, eq. 8 and 9).

    Instead of asking all earlier blocks, block ``t`` adds to its own gated
    value one earlier output, scaled by a learnable vector:

    .. math::
        O^t = \lambda_o^t \odot O^{t-1} +
              \sigma(q^t \cdot k^t / \sqrt d) V^t, \quad
        Y^t = X^t + \mathrm{DropPath}(\mathrm{BN}(O^t))

    :math:`\lambda_o` has one entry per channel, drawn from N(0, 1). There is
    no ReLU.

    The attention weighs no layers against each other, so the pruning hook has
    nothing to measure. A pruned state can still be set by hand.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        previous (str): What :math:`O^{t-1}` is. ``'identity'``: the residual
            block's identity input, after its downsample, as in the networks
            that the MRLA authors published. ``'output'``: the output of the
            active attention before it in the stage, 0 for the first, as eq. 8
            has it. Defaults to ``'identity'``.
        **kwargs: ``drop_path``, ``norm_cfg``, ``value_act_cfg``,
            ``zero_init`` and ``init_cfg``, see :class:`QKVLayerAttention`.

    Raises:
        ValueError: If ``previous`` is neither of the two, or as
            :class:`QKVLayerAttention` does.
    """

    def __init__(
        self, channels: int, head_dim: int = 32, previous: str = 'identity', **kwargs
    ) -> None:
        if previous not in ('identity', 'output'):
            raise ValueError(
                f"previous={previous!r} is unknown; allowed are 'identity' and 'output'"
            )
        super().__init__(channels, head_dim, **kwargs)
        self.previous = previous
        self.needs_identity = previous == 'identity'
        self.lambda_o = nn.Parameter(torch.randn(channels))

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        super().reset_parameters()
        if hasattr(self, 'lambda_o'):  # not yet in the parent's constructor
            nn.init.normal_(self.lambda_o)

    def retrieve(self, x: Tensor, memory: LayerMemory) -> Tensor:
        pooled, value = self._pool_and_value(x)
        query = self._split(self.query(pooled))
        key = self._split(self.key(pooled))
        # A product and a sum, not a matmul, which autocast would do in half
        scores = (query * key).sum(-1) / math.sqrt(self.head_dim)
        gate = self._per_channel(scores.sigmoid(), value)

        scale = self.lambda_o[:, None, None].to(value.dtype)
        previous = self._previous(memory)
        if previous is None:
            # 0 instead of O^(t-1), but lambda stays part of the graph:
            # distributed training waits for the gradient of each parameter.
            out = (gate + 0 * scale) * value
        else:
            out = torch.addcmul(gate * value, scale, previous.to(value.dtype))
        if self.previous == 'output':
            memory.output = out
        return self.drop_path(self.norm(out))

    def _previous(self, memory: LayerMemory) -> Optional[Tensor]:
        """What lambda is multiplied with, (B, C, H, W); None for zeros."""
        if self.previous == 'output':
            return memory.output
        if memory.identity is None:
            raise ValueError(
                "MRLALight with previous='identity' needs the identity input "
                'of its block in the memory; a LayerAttentionStage puts it '
                'there'
            )
        return memory.identity

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, previous={self.previous}'
