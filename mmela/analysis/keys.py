"""Statistics of the keys of a stage's layer attentions (KCLA, section IV)."""

from functools import partial
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import KCLA, AttentionState, LayerAttention
from .statistics import RunningMean


class KeyRecorder:
    r"""Similarity of the keys of a stage, and the weights that KCLA computes from them.

    The keys are those that the last active attention compares its query with. If
    attentions keep the keys of earlier blocks, as in MRLA-base, these are all keys of
    the stage; if each attention computes all keys, as in MLA, they are its own.

    KCLA weighs the blocks of head ``g`` by :math:`w^s = \exp(\min(\lVert k^s
    \rVert s_g, 10))`, so the share of block ``s`` in the features retrieved by block
    ``t`` is :math:`w^s / z^t` (KCLA, eq. 12). The memory of the previous stage has a
    share, too.

    Args:
        blocks (list[LayerAttention | None]): The attention of each block.

    Attributes:
        keys (RunningMean | None): Cosine similarity between the keys of each pair of
            blocks, averaged over heads, (T', T') for the ``T'`` blocks in
            :attr:`seen`.
        seen (list[int]): Blocks with a key.
        scores (dict[int, RunningMean]): For each KCLA, by index of its block, the
            shares of the previous stage and of each block, (G, 1 + T).
        limited (RunningMean): Share of the weights with an exponent of 10 or more,
            which are all equal, over images and blocks, (G, ).
    """

    def __init__(self, blocks: List[Optional[LayerAttention]]) -> None:
        self.blocks = blocks
        self.keys: Optional[RunningMean] = None
        self.seen: List[int] = []
        self.scores: Dict[int, RunningMean] = {}
        self.limited = RunningMean()
        self._calls: Dict[int, List[Tensor]] = {}
        self._shares: Optional[Tensor] = None

    def hooks(self) -> list:
        """Register the hooks.

        Returns:
            list: Their handles.
        """
        self.reset()
        handles = []
        for index, attention in enumerate(self.blocks):
            key = getattr(attention, 'key', None)
            if key is None or not hasattr(attention, 'heads'):
                continue
            handles.append(
                key.register_forward_hook(partial(self._record_key, index, attention))
            )
            if isinstance(attention, KCLA):
                handles.append(
                    attention.register_forward_hook(partial(self._record_shares, index))
                )
        return handles

    def reset(self) -> None:
        """Drop the records of an unfinished forward pass."""
        self._calls, self._shares = {}, None

    def _record_key(
        self,
        index: int,
        attention: LayerAttention,
        module: nn.Module,
        args: tuple,
        output: Tensor,
    ) -> None:
        keys = attention.heads(output.detach()).float()
        self._calls.setdefault(index, []).append(keys)

    def _record_shares(
        self, index: int, attention: KCLA, args: Tuple[Tensor, KCLA.Memory], output
    ) -> None:
        mass = args[1].mass
        if mass is None:
            return
        norm = self._calls[index][-1].norm(dim=-1)
        share = attention.weigh(norm) / mass  # (B, G)
        limit = norm * attention.scales >= 10
        self.limited.add(limit & attention.exp_norm)
        if self._shares is None:
            self._shares = share.new_zeros(*share.shape, 1 + len(self.blocks))
            self._shares[..., 0] = 1
        # A new block scales the shares of earlier ones by z^(t-1) / z^t
        self._shares = self._shares * (1 - share)[..., None]
        self._shares[..., 1 + index] = share
        self.scores.setdefault(index, RunningMean()).add(self._shares)

    def finish(self) -> None:
        """Add the keys of a finished forward pass."""
        calls = self._calls
        self.reset()
        if not calls:
            return
        last = max(calls)
        if len(calls[last]) > 1:  # one key for each block that the last one sees
            keys = calls[last]
            seen = [
                i
                for i, attention in enumerate(self.blocks[: last + 1])
                if attention is not None
                and attention.attention_state != AttentionState.PRUNED
            ]
        else:
            seen = sorted(calls)
            keys = [calls[i][0] for i in seen]
        if len(seen) != len(keys) or len({k.shape for k in keys}) > 1:
            return
        if self.keys is None:
            self.keys, self.seen = RunningMean(), seen
        unit = F.normalize(torch.stack(keys, dim=2), dim=-1)  # (B, G, t, d)
        self.keys.add((unit @ unit.transpose(-1, -2)).mean(1))

    def describe_keys(self) -> Optional[dict]:
        """Convert the similarity of the keys to plain values.

        Returns:
            dict | None: ``blocks``; ``mean`` and ``std`` over images for each pair,
            with 0 for a zero key; and ``overall``, the mean over all pairs. None for
            fewer than two keys.
        """
        if self.keys is None or len(self.seen) < 2:
            return None
        mean = self.keys.mean()
        count = len(mean)
        pairs = mean[~torch.eye(count, dtype=torch.bool)]
        return dict(
            blocks=self.seen,
            mean=mean.tolist(),
            std=self.keys.std().tolist(),
            overall=float(pairs.mean()),
        )

    def describe_scores(self) -> Optional[dict]:
        """Convert the shares of the blocks in KCLA to plain values.

        Returns:
            dict | None: ``temperatures`` of the heads and the shares ``limited``;
            ``mean`` over the heads, T lists of T shares, and ``heads``, G such maps,
            with querying blocks as rows and None for a missing share; ``before``, the
            share of the previous stage, with T values in ``mean`` and G lists of T in
            ``heads``. None without KCLA.
        """
        if not self.scores:
            return None
        attention = self.blocks[min(self.scores)]
        count = len(self.blocks)
        heads = attention.num_heads
        maps = [[[None] * count for _ in range(count)] for _ in range(heads + 1)]
        before = [[None] * count for _ in range(heads + 1)]
        for row, mean in self.scores.items():
            shares = mean.mean()
            for target, first, values in zip(
                maps, before, [shares.mean(0).tolist(), *shares.tolist()]
            ):
                first[row] = values[0]
                for column in self.scores:
                    if column <= row:
                        target[row][column] = values[1 + column]
        return dict(
            temperatures=attention.scales.tolist(),
            limited=self.limited.mean().tolist(),
            mean=maps[0],
            heads=maps[1:],
            before=dict(mean=before[0], heads=before[1:]),
        )
