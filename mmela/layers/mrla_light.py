import math
from dataclasses import dataclass
from typing import Optional

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..registry import LAYER_ATTENTIONS
from .base import QKVLayerAttention, StageMemory, pool


@LAYER_ATTENTIONS.register_module()
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
            ``zero_init``, ``token_norm_cfg``, ``small_init`` and ``init_cfg``,
            see :class:`QKVLayerAttention`.

    Raises:
        ValueError: If ``previous`` is neither of the two, or as
            :class:`QKVLayerAttention` does.
    """

    @dataclass
    class Memory(StageMemory):
        """What block ``t`` sees of what was before it.

        Attributes:
            identity (Tensor, optional): Identity input of the block, after
                its downsample, (B, C, H, W); the stage puts it there.
            output (Tensor, optional): :math:`O^{t-1}` of the active attention
                before, (B, C, H, W).
        """

        identity: Optional[Tensor] = None
        output: Optional[Tensor] = None

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
        if self.needs_identity and kwargs.get('token_norm_cfg'):
            norm = build_norm_layer(kwargs['token_norm_cfg'], channels)[1]
            self.identity_norm = norm

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        super().reset_parameters()
        if hasattr(self, 'lambda_o'):  # not yet in the parent's constructor
            nn.init.normal_(self.lambda_o)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        pooled = pool(x)
        query, key = self.heads(self.query(pooled)), self.heads(self.key(pooled))
        # A product and a sum, not a matmul, which autocast would do in half
        scores = (query * key).sum(-1) / math.sqrt(self.head_dim)  # (B, G)
        value = self.value_act(self.value(x))
        gate = self.per_channel(scores.sigmoid(), value)

        scale = self.lambda_o[:, None, None].to(value.dtype)
        previous = memory.identity if self.needs_identity else memory.output
        if previous is not None:
            out = torch.addcmul(gate * value, scale, previous.to(value.dtype))
        elif self.needs_identity:
            raise ValueError(
                "MRLALight with previous='identity' needs the identity input of its "
                'block in the memory; an AttentionStage puts it there'
            )
        else:
            # 0 instead of O^(t-1), but lambda stays part of the graph:
            # distributed training waits for the gradient of each parameter.
            out = (gate + 0 * scale) * value
        if not self.needs_identity:
            memory.output = out
        return out if self.norm is None else self.norm(out)

    def signature(self) -> str:
        return f'{super().signature()[:-1]}, previous={self.previous})'
