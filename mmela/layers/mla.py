from dataclasses import dataclass, field
from typing import List

import torch
from torch import Tensor

from ..registry import LAYER_ATTENTIONS
from .base import StageMemory, pool
from .mrla_base import MRLABase


@LAYER_ATTENTIONS.register_module()
class MLA(MRLABase):
    r"""Multi-head layer attention, the quadratic original (MRLA, eq. 3 and 4).

    Unlike :class:`MRLABase`, block ``t`` computes the keys and values of all blocks of
    its stage so far with its own transforms:

    .. math::
        a^t = \mathrm{softmax}_{s \le t}(f_Q^t(X^t) \cdot f_K^t(X^s) /
              \sqrt d), \quad
        O^t = \sum_{s \le t} a^t_s f_V^t(X^s), \quad
        Y^t = X^t + \mathrm{DropPath}(\mathrm{ReLU}(\mathrm{BN}(O^t)))

    So block ``t`` runs ``t`` value convolutions. :math:`X^s` is a block's output before
    its attention.

    With ``keep_value``, later attentions still see the block output of a pruned one,
    which needs no parameters.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        replace (bool): Replace the block's output with BN(O) instead of adding
            ReLU(BN(O)) to it, as in the network of eq. 4 that the authors published
            for ImageNet. Defaults to False.
        mixed_heads (bool): Split keys and values into heads as that network does. Its
            code views (B, t, C) as (B, G, t, d) without moving the blocks behind the
            heads, so from the second block of a stage on, the tokens of a head mix
            pieces of several blocks and channels. Use it for checkpoints of that
            network; there is no distribution over blocks to measure redundancy on
            then. Defaults to False.
        **kwargs: See :class:`MRLABase`.

    Raises:
        ValueError: If ``replace`` is set together with ``drop_path``,
            ``zero_init``, ``small_init`` or ``relu``, and as in :class:`MRLABase`.
    """

    @dataclass
    class Memory(StageMemory):
        """Outputs of the blocks so far.

        Attributes:
            inputs (list[Tensor]): The outputs :math:`X^s`, each (B, C, H, W).
            pooled (list[Tensor]): The same averaged over space, each (B, 1, C).
        """

        inputs: List[Tensor] = field(default_factory=list)
        pooled: List[Tensor] = field(default_factory=list)

    used_by_value = ('pre_norm',)

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        replace: bool = False,
        mixed_heads: bool = False,
        **kwargs,
    ) -> None:
        if replace:
            # These arguments only affect what is added to the output
            for name in ('drop_path', 'zero_init', 'small_init', 'relu'):
                if kwargs.get(name):
                    raise ValueError(
                        f'{name}={kwargs[name]} cannot be set together with '
                        'replace=True, which adds nothing to the output of a block'
                    )
            kwargs['relu'] = False
        super().__init__(channels, head_dim, **kwargs)
        self.replace = replace
        self.mixed_heads = mixed_heads
        if mixed_heads:
            self.prunable = False

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        self.store(x, memory)
        query = self.heads(self.query(memory.pooled[-1])).unsqueeze(2)
        keys = torch.stack([self.heads(self.key(y)) for y in memory.pooled], dim=2)
        values = [self.value_act(self.value(y)) for y in memory.inputs]
        if self.mixed_heads:
            batch, heads, count, width = keys.shape
            keys = keys.transpose(1, 2).reshape(batch, heads, count, width)
            stacked = torch.stack(values, dim=1)  # (B, t, C, H, W)
            split = stacked.reshape(batch, heads, count, -1, *x.shape[2:])
            values = [value.flatten(1, 2) for value in split.unbind(2)]
        return self.retrieve(self.weights(query, keys, memory), values)

    @classmethod
    def is_branch(cls, arguments: dict) -> bool:
        return not arguments.get('replace')

    def combine(self, features: Tensor, retrieved: Tensor) -> Tensor:
        return retrieved if self.replace else super().combine(features, retrieved)

    def store(self, x: Tensor, memory: Memory) -> None:
        """Add the output of the block to the memory."""
        memory.inputs.append(x)
        memory.pooled.append(pool(x))

    def fingerprint(self) -> str:
        rest = ', replace=True' if self.replace else ''
        rest += ', mixed_heads=True' if self.mixed_heads else ''
        return f'{super().fingerprint()[:-1]}{rest})'
