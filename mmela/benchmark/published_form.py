"""MRLA-base as in its equations, with all keys and values concatenated.

This is the baseline of the benchmarks: block ``t`` concatenates the keys and the values
of blocks 1 to ``t`` (MRLA, eq. 6) and multiplies them head by head (eq. 9). Both the
concatenation and the split into heads copy, so a stage of ``T`` blocks keeps O(T^2)
values for its backward pass. It was written from the paper, not from the authors' code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import MRLABase
from ..registry import LAYER_ATTENTIONS


@LAYER_ATTENTIONS.register_module()
class PublishedMRLABase(MRLABase):
    """MRLA-base with the concatenations of its published form (MRLA, eq. 6 and 9).

    It has the parameters, results and arguments of :class:`mmela.layers.MRLABase`, but
    ignores ``backend``.
    """

    def fingerprint(self) -> str:
        # That of MRLABase, so that its checkpoints load
        return f'MRLABase(head_dim={self.head_dim})'

    def attend(self, x: Tensor, memory: MRLABase.Memory) -> Tensor:
        pooled = self.store(x, memory)
        key, value = memory.keys[0], memory.values[0]
        batch, length = key.shape[:2]
        query = self.query(pooled).view(batch, 1, self.num_heads, -1)
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
        scores = scores / math.sqrt(self.head_dim)  # (B, G, 1, t)
        memory.scores.append(scores.squeeze(2))
        value = value.reshape(batch, length, self.num_heads, -1)
        # (B, G, t, d * H * W): another copy
        out = scores.softmax(-1) @ value.transpose(1, 2).contiguous()
        return F.relu(self.norm(out.reshape(x.shape)))

    def store(self, x: Tensor, memory: MRLABase.Memory) -> Tensor:
        batch, channels = x.shape[:2]
        pooled = F.adaptive_avg_pool2d(x, 1).view(batch, 1, channels)
        key = self.key(pooled).view(batch, 1, self.num_heads, self.head_dim)
        value = self.value_act(self.value(x)).unsqueeze(1)
        # The tensors of the blocks so far: (B, t, G, d) and (B, t, C, H, W)
        if memory.values:
            key = torch.cat([memory.keys[0], key], dim=1)
            value = torch.cat([memory.values[0], value], dim=1)
        memory.keys[:], memory.values[:] = [key], [value]
        return pooled
