from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_count
from ..ops import check_backend, depth_mixture, is_compiling, layer_weighted_sum
from ..ops.depth_mixture import (
    add_scaled,
    added_since,
    changes_of,
    depth_scores,
    inverse_rms,
)
from ..registry import LAYER_ATTENTIONS
from .base import LayerAttention, StageMemory, check_divides, pool


@LAYER_ATTENTIONS.register_module()
class AttnRes(LayerAttention):
    r"""Attention residuals: a block outputs a mixture of what the blocks have added.

    As published for language models (Attention Residuals, arXiv:2603.15031, full
    form), each block has one learned vector :math:`w^t`, its pseudo-query, which starts
    at 0. Each token :math:`v^s` is what a block of the stage has added: :math:`v^0` is
    the output of the first block, and :math:`v^t = X^t - Y^{t-1}`.

    .. math::
        a^t = \mathrm{softmax}_{s \le t}(w^t \cdot \mathrm{RMSNorm}(v^s)), \quad
        Y^t = n \sum_{s \le t} a^t_s v^s

    :math:`Y^t` replaces the block's output. The published version has :math:`n = 1`, a
    mean, and is for networks trained from scratch. The rest is ours: attention over
    the residual blocks of a stage, ``total='sum'``, ``heads``, ``per='image'`` and
    pruning. With ``'sum'``, :math:`n` is the number of tokens. At :math:`w = 0` this is
    the plain residual sum, bit for bit with up to 40 tokens: it is computed as
    :math:`X^t + \sum_s e_s v^s`, where :math:`e`, the change of the weights from one
    block to the next, is then exactly 0. With more tokens, each term is off by a unit
    in the last place of its weight.

    A pruned block is the plain residual block. What it adds then belongs to the token
    of the next attention, as if both were in one group; with ``keep_value`` it stays a
    separate token, unless ``every`` has it share the token of the previous block. The
    first block of a stage has one token and no pseudo-query.

    Args:
        channels (int): Channels ``C`` of the block's output.
        per (str): With ``'position'``, as published, each position of a map and each
            token of a transformer, including class tokens, has its own weights. With
            ``'image'``, all share the weights of their mean. Defaults to
            ``'position'``.
        heads (int): Number of heads with ``C / heads`` channels each. Each head has its
            own weights; the norm is over all channels. The published number is 1.
            Defaults to 1.
        total (str): Sum of the weights: 1 with ``'mean'``, or the number of tokens with
            ``'sum'``. Defaults to ``'mean'``.
        every (int): Number of blocks in a group (the published block form). The blocks
            of a group add to one token; the first block of a stage is a group by
            itself. A block sees the sums of the previous groups, and the sum of its own
            group so far. Defaults to 1: each block is a group.
        norm_weight (bool): Give RMSNorm a weight, as in the published networks. Only
            its product with the query counts, so it only changes how fast that
            learns. Defaults to False.
        drop_path (float): Probability of using the plain residual block for a sample
            in training. Defaults to 0, as published.
        zero_init (bool): Set this if the network starts from the weights of a plain
            one. It needs ``total='sum'``, and skips stages that the backbone freezes,
            where nothing could learn. Defaults to False.
        backend (str): ``'compile'`` has ``torch.compile`` fuse all of
            :meth:`forward`, see :class:`mmela.ops.CompiledForward`; ``'reference'``
            is plain PyTorch code. Defaults to ``'auto'``.
        block (int): Index of the block in its stage, filled in by the backbone.
            Defaults to 1.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: If ``per``, ``total`` or ``backend`` is unknown, ``heads`` does not
            divide ``channels``, ``every`` is less than 1, ``zero_init`` is set without
            ``total='sum'``, ``drop_path`` is not in [0, 1), or ``drop_path`` and
            ``every`` are both set.
    """

    @dataclass
    class Memory(StageMemory):
        """Memory of the earlier blocks.

        Attributes:
            tokens (list[Tensor]): What each group has added, (B, C, H, W) each.
            keys (list[Tensor]): Means of the tokens, (B, C, 1, 1) each, with
                ``per='image'``; empty otherwise, because the tokens are the keys.
            norms (list[Tensor]): Inverse root mean squares of the keys over the
                channels, (B, 1, h, w) each.
            weights (Tensor, optional): Weights of the tokens in ``output``,
                (t, B, G, h, w).
            output (Tensor, optional): Output of the last attention, (B, C, H, W).
            version (int, optional): Version of ``output``, to detect that the network
                has written into it.
            group (int): Group of the last token.
        """

        tokens: List[Tensor] = field(default_factory=list)
        keys: List[Tensor] = field(default_factory=list)
        norms: List[Tensor] = field(default_factory=list)
        weights: Optional[Tensor] = None
        output: Optional[Tensor] = None
        version: Optional[int] = None
        group: int = -1

    prunable = True
    needs_map = False
    query: Optional[nn.Parameter]
    norm_weight: Optional[nn.Parameter]

    def __init__(
        self,
        channels: int,
        per: str = 'position',
        heads: int = 1,
        total: str = 'mean',
        every: int = 1,
        norm_weight: bool = False,
        drop_path: float = 0.0,
        zero_init: bool = False,
        backend: str = 'auto',
        block: int = 1,
        init_cfg: Optional[dict] = None,
    ) -> None:
        check_choice('per', per, ('position', 'image'))
        check_choice('total', total, ('mean', 'sum'))
        check_divides('heads', heads, channels)
        check_count('every', every, 1)
        check_count('block', block, 0)
        if zero_init and total != 'sum':
            raise ValueError(
                "zero_init=True needs total='sum', because with total='mean' the "
                'network does not start as the plain one'
            )
        if drop_path and every > 1:
            raise ValueError(
                f'drop_path={drop_path} needs every=1, got every={every}: the blocks '
                'of a group share a token, so a single one cannot be dropped'
            )
        super().__init__(channels, channels // heads, drop_path, init_cfg)
        self.per = per
        self.total = total
        self.every = every
        self.backend = check_backend(backend)
        # The first block is a group by itself
        self.group = (block + every - 1) // every
        self.register_parameter('query', None)
        self.register_parameter('norm_weight', None)
        if block:
            self.query = nn.Parameter(torch.zeros(channels))
            if norm_weight:
                self.norm_weight = nn.Parameter(torch.ones(channels))

    @classmethod
    def is_branch(cls, arguments: dict) -> bool:
        return False

    def reset_parameters(self) -> None:
        """Set the query to 0 and the weight of the norm to 1."""
        if self.query is not None:
            nn.init.zeros_(self.query)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def update(self, features: Tensor, memory: Any, args: tuple, output: Any) -> Tensor:
        if memory.version is not None and memory.output._version != memory.version:
            # The network has written into the output
            rebuilt = add_scaled(None, memory.weights, memory.tokens)
            memory.output = rebuilt.to(memory.output.dtype)
        new = super().update(features, memory, args, output)
        if self.active:
            passed_on, _ = self.place.features.to_positions(new)
            if is_compiling() or new.is_inference():  # tensors have no version here
                memory.output, memory.version = passed_on.clone(), None
            else:
                memory.output, memory.version = passed_on, new._version
        return new

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        contained, values = self._extend(x, memory)
        if self.query is None:  # one token, whose weight is 1
            out, scores = x, torch.zeros_like(contained)
        else:
            query = self.query
            if self.norm_weight is not None:
                query = query * self.norm_weight
            out, scores = self._attend(x, query, contained, values, memory)
        scores = scores.movedim(0, -1).flatten(2, 3)  # (B, G, P, t)
        memory.scores.append(scores if self.per == 'position' else scores[:, :, 0])
        return out

    def store(self, x: Tensor, memory: Memory) -> None:
        """Add what the block has added to the memory, as a separate token."""
        if memory.group != self.group:
            self._extend(x, memory)
            memory.output, memory.version = x, None
        # Otherwise the next attention finds it in the difference from the last output

    def combine(self, features: Tensor, retrieved: Tensor) -> Tensor:
        return retrieved

    def opens_token(self, before: Optional[LayerAttention]) -> bool:
        return getattr(before, 'group', None) != self.group

    def fingerprint(self) -> str:
        return (
            f'AttnRes(per={self.per}, heads={self.num_heads}, total={self.total}, '
            f'every={self.every}, norm_weight={self.norm_weight is not None})'
        )

    def _extend(self, x: Tensor, memory: Memory) -> Tuple[Tensor, List[Tensor]]:
        """Add the difference from the last attention's output to the tokens.

        Returns:
            tuple[Tensor, list[Tensor]]: Weights of the tokens in ``x``,
            (t, B, G, h, w), and the tokens, (B, C, H, W) each, followed by the
            difference if it is only a part of the last token.
        """
        backend = self.backend if self.per == 'position' else 'reference'
        token, norm = added_since(x, memory.output, backend)
        added, opens = token, memory.group != self.group
        if not opens:
            token = memory.tokens.pop() + added
            norm = inverse_rms(token)
            memory.norms.pop()
            memory.keys = memory.keys[:-1]
        if self.per == 'image':
            key = pool(token).squeeze(1)[..., None, None]
            memory.keys.append(key)
            norm = inverse_rms(key)
        memory.tokens.append(token)
        memory.norms.append(norm)
        memory.group = self.group
        if opens:
            one = torch.ones_like(norm).expand(-1, self.num_heads, -1, -1)[None]
            before = memory.weights
            memory.weights = one if before is None else torch.cat([before, one])
        assert memory.weights is not None
        return memory.weights, [*memory.tokens, *([] if opens else [added])]

    def _attend(
        self,
        x: Tensor,
        query: Tensor,
        contained: Tensor,
        values: List[Tensor],
        memory: Memory,
    ) -> Tuple[Tensor, Tensor]:
        """Compute the output, (B, C, H, W), and scores, (t, B, G, h, w)."""
        norms = torch.stack(memory.norms)
        factor = float(len(memory.tokens)) if self.total == 'sum' else 1.0
        drops = self.training and not isinstance(self.drop_path, nn.Identity)
        if self.per == 'position' and not drops:
            out, scores, memory.weights, memory.tokens = depth_mixture(
                x,
                contained,
                query,
                norms,
                values,
                factor,
                self.backend,
                chained=self.every == 1,
            )
            return out, scores
        keys = memory.keys or memory.tokens
        scores = depth_scores(query, norms, keys, self.num_heads)
        memory.weights = scores.softmax(0) * factor
        changes = changes_of(memory.weights, contained, values)
        if drops:
            # Not scaled as a branch is, because the weights have to be a mixture
            kept = self.drop_path(torch.ones_like(norms[0, :, :1, :1, :1])) > 0
            changes = changes * kept
            memory.weights = contained + changes
        return self._add(x, changes, values), scores

    def _add(self, x: Tensor, weights: Tensor, values: List[Tensor]) -> Tensor:
        """Add a weighted sum to a map, in at least single precision."""
        if self.per == 'position':
            return add_scaled(x, weights, values)
        weights = torch.cat([torch.ones_like(weights[:1]), weights])
        attn = weights[..., 0, 0].permute(1, 2, 0)
        return layer_weighted_sum(attn, [x, *values], self.backend)
