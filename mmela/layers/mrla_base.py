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

    Block ``t`` compares its query with its own key and with the keys of the earlier
    blocks of its stage, and sums their values with the resulting weights:

    .. math::
        a^t = \mathrm{softmax}_{s \le t}(q^t \cdot k^s / \sqrt d), \quad
        O^t = \sum_{s \le t} a^t_s V^s, \quad
        Y^t = X^t + \mathrm{DropPath}(\mathrm{ReLU}(\mathrm{BN}(O^t)))

    Without a normalization (``norm_cfg=None``, as in transformers) there is no ReLU.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        backend (str): How to compute the sum, see
            :func:`mmela.ops.layer_weighted_sum`. ``'auto'`` computes it on a CPU
            together with the normalization where possible, see
            :func:`mmela.ops.can_norm_sum`. ``'compile'`` fuses all of :meth:`forward`
            with ``torch.compile``, see :class:`mmela.ops.CompiledForward`. Defaults
            to ``'auto'``.
        relu (bool): Apply a ReLU after the normalization. Some of the networks that
            the authors published have none. Defaults to True.
        **kwargs: ``drop_path``, ``norm_cfg``, ``value_act_cfg``,
            ``zero_init``, ``token_norm_cfg``, ``small_init`` and ``init_cfg``,
            see :class:`QKVLayerAttention`.

    Raises:
        ValueError: If ``backend`` is unknown, and as in :class:`QKVLayerAttention`.
    """

    @dataclass
    class Memory(StageMemory):
        """Keys and values of the blocks so far.

        Attributes:
            keys (list[Tensor]): The keys, each (B, G, d).
            values (list[Tensor]): The values, each (B, C, H, W).
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
            memory (StageMemory): Memory of the stage; the scores are added to it.

        Returns:
            Tensor: (B, G, t).
        """
        # Not a matmul, which autocast would compute in half precision
        scores = (query * keys).sum(-1)  # (B, G, t)
        scores = scores / math.sqrt(query.shape[-1])
        memory.scores.append(scores)
        return scores.softmax(-1)

    def retrieve(self, attn: Tensor, values: List[Tensor]) -> Tensor:
        """Sum the values, normalize, and apply the ReLU.

        Args:
            attn (Tensor): Weights of the blocks, (B, G, t).
            values (list[Tensor]): Their values, each (B, C, H, W).

        Returns:
            Tensor: The retrieved features, (B, C, H, W).
        """
        # For a single value, `normed_sum` assumes a softmax, whose weight is 1
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
        """Add key and value to the memory; returns X pooled, (B, 1, C)."""
        pooled = pool(x)
        memory.keys.append(self.heads(self.key(pooled)))
        memory.values.append(self.value_act(self.value(x)))
        return pooled

    def fingerprint(self) -> str:
        # Checkpoints saved before the argument existed have no entry for the default
        relu = '' if self.relu else ', relu=False'
        return f'{super().fingerprint()[:-1]}{relu})'
