import math
from typing import List

import torch
from mmengine.registry import MODELS
from torch import Tensor

from ..ops import check_backend, layer_weighted_sum, share_value
from .base import LayerMemory
from .qkv import QKVLayerAttention


@MODELS.register_module(force=True)  # instead of its placeholder
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
            :func:`mmela.ops.layer_weighted_sum`. Defaults to ``'auto'``.
        **kwargs: ``drop_path``, ``norm_cfg``, ``value_act_cfg``,
            ``zero_init`` and ``init_cfg``, see :class:`QKVLayerAttention`.

    Raises:
        ValueError: If there is no such ``backend``, or as
            :class:`QKVLayerAttention` does.
    """

    prunable = True

    def __init__(
        self, channels: int, head_dim: int = 32, backend: str = 'auto', **kwargs
    ) -> None:
        check_backend(backend)
        super().__init__(channels, head_dim, **kwargs)
        self.backend = backend

    def retained_parameters(self) -> List[str]:
        # Transformers normalize their tokens before they are stored.
        norm = getattr(self, 'pre_norm', None)
        names = [] if norm is None else dict(norm.named_parameters())
        return ['key.weight', 'value.weight', *(f'pre_norm.{n}' for n in names)]

    def store(self, x: Tensor, memory: LayerMemory) -> None:
        self._store(x, memory)

    def _store(self, x: Tensor, memory: LayerMemory) -> Tensor:
        """Store key and value; returns the pooled input, (B, 1, C)."""
        pooled, value = self._pool_and_value(x)
        memory.keys.append(self._split(self.key(pooled)))
        before = memory.values[-1] if memory.values else None
        memory.values.append(share_value(value, before, self.backend))
        return pooled

    def retrieve(self, x: Tensor, memory: LayerMemory) -> Tensor:
        pooled = self._store(x, memory)
        return self._attend(pooled, memory.keys, memory.values, memory)

    def _attend(
        self,
        pooled: Tensor,
        keys: List[Tensor],
        values: List[Tensor],
        memory: LayerMemory,
    ) -> Tensor:
        query = self._split(self.query(pooled)).unsqueeze(2)
        # A product and a sum, not a matmul, which autocast would do in half
        scores = (query * torch.stack(keys, dim=2)).sum(-1)
        scores = scores / math.sqrt(self.head_dim)
        memory.scores.append(scores)
        attn = scores.softmax(-1).to(values[-1].dtype)
        return self._normalize(layer_weighted_sum(attn, values, self.backend))
