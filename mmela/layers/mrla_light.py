import math
from dataclasses import dataclass
from typing import Optional

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..arguments import check_choice
from ..registry import LAYER_ATTENTIONS
from .base import QKVLayerAttention, StageMemory, pool


@LAYER_ATTENTIONS.register_module()
class MRLALight(QKVLayerAttention):
    r"""MRLA-light: layer attention at linear cost (MRLA, eq. 8 and 9).

    Instead of attending over all earlier blocks, block ``t`` adds one earlier output,
    scaled by a learnable vector, to its own gated value:

    .. math::
        O^t = \lambda_o^t \odot O^{t-1} +
              \sigma(q^t \cdot k^t / \sqrt d) V^t, \quad
        Y^t = X^t + \mathrm{DropPath}(\mathrm{BN}(O^t))

    :math:`\lambda_o` has one entry per channel, drawn from N(0, 1). There is no ReLU.

    The attention computes no distribution over layers, so the pruning hook cannot
    measure it. :func:`mmela.structure.prune` still prunes it.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        previous (str): The meaning of :math:`O^{t-1}`. ``'identity'``: the residual
            block's identity input after its downsample, as in the networks that the
            MRLA authors published. ``'output'``: the output of the previous active
            attention of the stage, 0 for the first one, as in eq. 8. ``'none'``: no
            such term (table 4, b). Defaults to ``'identity'``.
        learn_lambda (bool): Whether :math:`\lambda_o` is learned; if False, it is 1
            (table 4, e). Defaults to True.
        gate (bool): Whether the value is gated. False together with
            ``previous='none'`` leaves only a depth-wise convolution (tables 4, g and
            12, a). Defaults to True.
        **kwargs: ``drop_path``, ``norm_cfg``, ``value_act_cfg``,
            ``zero_init``, ``token_norm_cfg``, ``small_init``, ``init_cfg``,
            ``value_conv`` and ``fc_reduction``, see
            :class:`QKVLayerAttention`.

    Raises:
        ValueError: If ``previous`` is unknown, and as in :class:`QKVLayerAttention`.
    """

    @dataclass
    class Memory(StageMemory):
        """The earlier output that block ``t`` adds.

        Attributes:
            identity (Tensor, optional): Identity input of the block after its
                downsample, (B, C, H, W); the block's hooks set it.
            shortcut (Tensor, optional): Output of the downsample of the running
                block.
            output (Tensor, optional): :math:`O^{t-1}` of the previous active
                attention, (B, C, H, W).
        """

        identity: Optional[Tensor] = None
        shortcut: Optional[Tensor] = None
        output: Optional[Tensor] = None

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        previous: str = 'identity',
        learn_lambda: bool = True,
        gate: bool = True,
        **kwargs,
    ) -> None:
        check_choice('previous', previous, ('identity', 'output', 'none'))
        super().__init__(channels, head_dim, **kwargs)
        self.previous = previous
        self.needs_identity = previous == 'identity'
        self.learn_lambda = learn_lambda
        self.gate = gate
        if learn_lambda and previous != 'none':
            self.lambda_o = nn.Parameter(torch.randn(channels))
        if not gate:
            del self.query, self.key
        if self.needs_identity and kwargs.get('token_norm_cfg'):
            norm = build_norm_layer(kwargs['token_norm_cfg'], channels)[1]
            self.identity_norm = norm

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        if hasattr(self, 'lambda_o'):  # the parent's constructor calls this too early
            nn.init.normal_(self.lambda_o)
        if hasattr(self, 'identity_norm'):
            self.identity_norm.reset_parameters()

    def connect(self, block):
        shortcut = self.place.shortcut if self.needs_identity else None
        return {shortcut: 'note_shortcut'} if shortcut else {}, {}

    def note_shortcut(self, x: Tensor, output: Tensor, memory: Optional[Memory]):
        """Store the output of the block's downsample in the memory.

        Args:
            x (Tensor): Its input, not used.
            output (Tensor): Its output, (B, C, H, W).
            memory (MRLALight.Memory, optional): Memory of the stage; None if the
                downsample runs outside of its block.
        """
        if memory is not None:
            memory.shortcut = output

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        value = self.value_act(self.value(x))
        if self.gate:
            value = value * self._gates(x, value)
        out = self._with_previous(value, memory)
        if self.previous == 'output':
            memory.output = out
        return out if self.norm is None else self.norm(out)

    def _gates(self, x: Tensor, value: Tensor) -> Tensor:
        """Gate of the value by query and key, (B, C, 1, 1)."""
        pooled = pool(x)
        query, key = self.heads(self.query(pooled)), self.heads(self.key(pooled))
        # Not a matmul, which autocast would compute in half precision
        scores = (query * key).sum(-1) / math.sqrt(query.shape[-1])  # (B, G)
        return self.per_channel(scores.sigmoid(), value)

    def _with_previous(self, value: Tensor, memory: Memory) -> Tensor:
        """The gated value plus the scaled earlier output, (B, C, H, W)."""
        if self.previous == 'none':
            return value
        previous = memory.identity if self.needs_identity else memory.output
        if previous is None and self.needs_identity:
            raise ValueError(
                "MRLALight with previous='identity' finds no identity input in the "
                'memory, which the hooks of its block set; attach it with '
                'mmela.attach_layer_attention'
            )
        if not self.learn_lambda:
            return value if previous is None else value + previous.to(value.dtype)
        scale = self.lambda_o[:, None, None].to(value.dtype)
        if previous is not None:
            return torch.addcmul(value, scale, previous.to(value.dtype))
        # O^(t-1) is 0, but lambda stays in the graph, because distributed training
        # waits for the gradient of every parameter.
        return (1 + 0 * scale) * value

    def fingerprint(self) -> str:
        # Only values other than the default, as in older checkpoints
        rest = '' if self.learn_lambda else ', learn_lambda=False'
        return f'{super().fingerprint()[:-1]}, previous={self.previous}{rest})'
