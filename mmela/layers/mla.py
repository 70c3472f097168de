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

    Unlike in :class:`MRLABase`, block ``t`` computes the keys and values of
    all blocks of its stage so far with its own transforms:

    .. math::
        a^t = \mathrm{softmax}_{s \le t}(f_Q^t(X^t) \cdot f_K^t(X^s) /
              \sqrt d), \quad
        O^t = \sum_{s \le t} a^t_s f_V^t(X^s), \quad
        Y^t = X^t + \mathrm{DropPath}(\mathrm{ReLU}(\mathrm{BN}(O^t)))

    So each block of a stage costs as many value convolutions as there are
    blocks before it. :math:`X^s` is a block's output before its attention.

    An attention pruned with ``keep_value`` lets the later ones go on to see
    its block's output; no parameter of its own is needed for that.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        replace (bool): Let BN(O) take the place of the block's output instead
            of adding ReLU(BN(O)) to it, as in the network of eq. 4 that the
            authors published for ImageNet. Defaults to False.
        mixed_heads (bool): Cut keys and values into heads as that network does:
            its code views (B, t, C) as (B, G, t, d) without moving the blocks
            behind the heads, so that from the second block of a stage on, the
            tokens of a head are pieces of several blocks and channels. For
            checkpoints of it; there is then no distribution over blocks to
            measure redundancy on. Defaults to False.
        **kwargs: See :class:`MRLABase`.

    Raises:
        ValueError: If ``replace`` is set together with ``drop_path``,
            ``zero_init``, ``small_init`` or ``relu``, or as
            :class:`MRLABase` does.
    """

    @dataclass
    class Memory(StageMemory):
        """What block ``t`` sees of the blocks ``s`` before it.

        Attributes:
            inputs (list[Tensor]): Their outputs :math:`X^s`, each
                (B, C, H, W).
            pooled (list[Tensor]): The same averaged over space, each
                (B, 1, C).
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
            # Each of them speaks of what is added to the output
            for name in ('drop_path', 'zero_init', 'small_init', 'relu'):
                if kwargs.get(name):
                    raise ValueError(
                        f'replace=True adds nothing to the output of a block, so '
                        f'{name}={kwargs[name]} cannot be set'
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
        """Leave the output of the block in the memory."""
        memory.inputs.append(x)
        memory.pooled.append(pool(x))

    def fingerprint(self) -> str:
        rest = ', replace=True' if self.replace else ''
        rest += ', mixed_heads=True' if self.mixed_heads else ''
        return f'{super().fingerprint()[:-1]}{rest})'
