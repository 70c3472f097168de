import math
from dataclasses import dataclass, field
from typing import List, Tuple

import torch
from torch import Tensor

from ..ops import (
    can_norm_sum,
    check_backend,
    layer_weighted_sum,
    normed_sum,
    per_channel,
)
from ..registry import LAYER_ATTENTIONS
from .base import QKVLayerAttention, StageMemory, pool


@LAYER_ATTENTIONS.register_module()
class MRLABase(QKVLayerAttention):
    r"""MRLA-base: multi-head recurrent layer attention (MRLA, eq. 6 and 9).

    Block ``t`` asks the keys that it and the earlier blocks of its stage have
    left in the memory, and sums their values:

    .. math::
        a^t = \mathrm{softmax}_{s \le t}(q^t \cdot k^s / \sqrt d), \quad
        O^t = \sum_{s \le t} a^t_s V^s, \quad
        Y^t = X^t + \mathrm{DropPath}(\mathrm{ReLU}(\mathrm{BN}(O^t)))

    Without a normalization (``norm_cfg=None``, in transformers) there is no
    ReLU either.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        backend (str): How the sum is computed, see
            :func:`mmela.ops.layer_weighted_sum`; with ``'auto'``, on a CPU
            together with the normalization where that can be done, see
            :func:`mmela.ops.can_norm_sum`. ``'compile'`` has ``torch.compile`` fuse
            all of :meth:`forward`, see :class:`mmela.ops.CompiledForward`.
            Defaults to ``'auto'``.
        relu (bool): Have a ReLU after the normalization; some of the networks
            that the authors published have none. Defaults to True.
        **kwargs: ``drop_path``, ``norm_cfg``, ``value_act_cfg``,
            ``zero_init``, ``token_norm_cfg``, ``small_init`` and ``init_cfg``,
            see :class:`QKVLayerAttention`.

    Raises:
        ValueError: If there is no such ``backend``, or as
            :class:`QKVLayerAttention` does.
    """

    @dataclass
    class Memory(StageMemory):
        """What block ``t`` sees of the blocks ``s`` before it.

        Attributes:
            keys (list[Tensor]): Their keys, each (B, G, d).
            values (list[Tensor]): Their values, each (B, C, H, W).
        """

        keys: List[Tensor] = field(default_factory=list)
        values: List[Tensor] = field(default_factory=list)

    prunable = True
    used_by_value: Tuple[str, ...] = ('key', 'value', 'pre_norm')

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        backend: str = 'auto',
        relu: bool = True,
        **kwargs,
    ) -> None:
        backend = check_backend(backend)
        super().__init__(channels, head_dim, **kwargs)
        self.backend = backend
        self.relu = relu

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        pooled = self.store(x, memory)
        query = self.heads(self.query(pooled)).unsqueeze(2)  # (B, G, 1, d)
        attn = self.weights(query, torch.stack(memory.keys, dim=2), memory)
        return self.retrieve(attn, memory.values)

    def weights(self, query: Tensor, keys: Tensor, memory: StageMemory) -> Tensor:
        """Weights of the blocks (MRLA, eq. 6).

        Args:
            query (Tensor): (B, G, 1, d).
            keys (Tensor): (B, G, t, d).
            memory (StageMemory): Memory of the stage, which gets the scores.

        Returns:
            Tensor: (B, G, t).
        """
        # A product and a sum, not a matmul, which autocast would do in half
        scores = (query * keys).sum(-1)  # (B, G, t)
        scores = scores / math.sqrt(query.shape[-1])
        memory.scores.append(scores)
        return scores.softmax(-1)

    def retrieve(self, attn: Tensor, values: List[Tensor]) -> Tensor:
        """Sum the values, normalize, ReLU.

        Args:
            attn (Tensor): Weights of the blocks, (B, G, t).
            values (list[Tensor]): Their values, each (B, C, H, W).

        Returns:
            Tensor: What is retrieved, (B, C, H, W).
        """
        # Of a single value, that takes its weight for a softmax, which is 1
        fits = self.prunable or len(values) > 1
        if (
            fits
            and self.backend in ('auto', 'compile')
            and can_norm_sum(self.norm, values)
        ):
            weights = per_channel(attn, values[0])
            return normed_sum(weights, values, self.norm, self.relu)
        return self.norm_relu(layer_weighted_sum(attn, values, self.backend))

    def store(self, x: Tensor, memory: Memory) -> Tensor:
        """Leave key and value in the memory; returns X pooled, (B, 1, C)."""
        pooled = pool(x)
        memory.keys.append(self.heads(self.key(pooled)))
        memory.values.append(self.value_act(self.value(x)))
        return pooled

    def fingerprint(self) -> str:
        # As in checkpoints of versions without the argument where it is True
        relu = '' if self.relu else ', relu=False'
        return f'{super().fingerprint()[:-1]}{relu})'
