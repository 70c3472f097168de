import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_choice, check_count
from ..registry import LAYER_ATTENTIONS
from .mla import MLA

KINDS = ('linear', 'focused', 'hydra', 'performer', 'linformer')
# As in the networks that KCLA's authors published
FEATURES = 16
FOCUS = 2
RANK = 2


@LAYER_ATTENTIONS.register_module()
class LinearizedMLA(MLA):
    r"""Layer attention without the softmax over the blocks (KCLA, figure 3).

    What has been proposed to make self-attention linear in its tokens, applied
    to the blocks of a stage as the authors of KCLA do to compare with. The
    softmax of :class:`MLA` gives way to a product of features of query and key
    in each head, and the weights add up to no particular number:

    .. math::
        O^t = \sum_{s \le t} (\phi(q^t) \cdot \phi(k^s)) f_V^t(X^s)

    - ``'linear'``: :math:`\phi(x) = \mathrm{elu}(x) + 1` (linear attention,
      Katharopoulos et al., 2020).
    - ``'focused'``: the squares of :math:`\mathrm{ReLU}(x) / a` with the norm that
      they had before, with learned :math:`a` and a learned position added to
      :math:`X^t` (FLatten, Han et al., 2023).
    - ``'hydra'``: :math:`\phi(x) = x / \lVert x \rVert`, over all channels, each a
      head of its own (Hydra attention, Bolya et al., 2022).
    - ``'performer'``: sines and cosines of 16 / 2 random projections (random
      features as in Performers, Choromanski et al., 2021; drawn once and kept in
      the checkpoint).
    - ``'linformer'``: keeps the softmax, but over two learned mixtures of the keys
      and of the values in place of all of them, from the fourth block on (Linformer,
      Wang et al., 2020).

    Every block has transforms of its own here, so that nothing of the sum can be
    kept from one block to the next: cost and memory grow with the square of the
    number of blocks, as KCLA notes (section V-D).

    The authors' performer and Linformer differ in details: the one keeps the keys and
    values of earlier blocks, the other has biases in the mixtures.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. The authors have 8 for
            ``'linear'``, 16 for the others. Defaults to 32.
        kind (str): Which, see above. Defaults to ``'linear'``.
        block (int): Index of the block in its stage, filled in by the backbone.
            Defaults to 0.
        **kwargs: See :class:`MLA`. The authors have ``relu=False`` for
            ``'focused'`` and ``'hydra'``.

    Raises:
        ValueError: If ``kind`` is unknown, or as :class:`MLA` does.
    """

    prunable = False
    takes_block = True

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        kind: str = 'linear',
        block: int = 0,
        **kwargs,
    ) -> None:
        check_choice('kind', kind, KINDS)
        check_count('block', block, 0)
        self.kind = kind
        super().__init__(channels, head_dim, **kwargs)
        width = (
            self.query.out_features if isinstance(self.query, nn.Linear) else channels
        )
        if kind == 'focused':
            self.position = nn.Parameter(torch.zeros(channels, 1, 1))
            self.spread = nn.Parameter(
                torch.zeros(self.num_heads, 1, width // self.num_heads)
            )
        elif kind == 'performer':
            dim = width // self.num_heads
            projection = torch.randn(self.num_heads, dim, FEATURES // 2)
            self.register_buffer('projection', projection / math.sqrt(dim))
        elif kind == 'linformer' and block > RANK:
            self.mix_keys = nn.Linear(block + 1, RANK, bias=False)
            self.mix_values = nn.Linear(block + 1, RANK, bias=False)

    def store(self, x: Tensor, memory: MLA.Memory) -> None:
        """Leave the output of the block in the memory."""
        super().store(x + self.position if self.kind == 'focused' else x, memory)

    def weights(self, query: Tensor, keys: Tensor, memory: MLA.Memory) -> Tensor:
        """Weights of the blocks.

        Args:
            query (Tensor): (B, G, 1, d).
            keys (Tensor): (B, G, t, d).
            memory (StageMemory): Not used: there is no distribution to observe.

        Returns:
            Tensor: (B, G, t); for ``'hydra'``, (B, G d, t).
        """
        if self.kind == 'linformer':
            return self._low_rank(query, keys)
        query, keys = self._features(query), self._features(keys)
        if self.kind == 'hydra':
            return (query * keys).transpose(2, 3).flatten(1, 2)
        return (query * keys).sum(-1)

    def _features(self, x: Tensor) -> Tensor:
        """Features of queries or keys, (B, G, t, d) to (B, G, t, d')."""
        if self.kind == 'linear':
            return F.elu(x) + 1
        if self.kind == 'hydra':
            return x / _norm(x)
        if self.kind == 'performer':
            x = x @ self.projection.to(x.dtype)
            return torch.cat([x.sin(), x.cos()], dim=-1) * math.sqrt(2 / FEATURES)
        x = (F.relu(x) + 1e-6) / F.softplus(self.spread.to(x.dtype))
        powers = x**FOCUS
        return powers / _norm(powers) * _norm(x)

    def _low_rank(self, query: Tensor, keys: Tensor) -> Tensor:
        """Weights by way of two mixtures of keys and two of values."""
        if not hasattr(self, 'mix_keys'):
            scores = (query * keys).sum(-1) / math.sqrt(query.shape[-1])
            return scores.softmax(-1)
        count = keys.shape[2]  # fewer where earlier attentions are pruned
        mix = self.mix_keys.weight[:, :count].to(keys.dtype)
        scores = (query * (mix @ keys)).sum(-1) / math.sqrt(query.shape[-1])
        return scores.softmax(-1) @ self.mix_values.weight[:, :count].to(keys.dtype)

    def fingerprint(self) -> str:
        return f'{super().fingerprint()[:-1]}, kind={self.kind})'


def _norm(x: Tensor) -> Tensor:
    """Norm over all channels, heads taken together: (B, G, t, d) to (B, 1, t, 1)."""
    return x.norm(dim=(1, 3), keepdim=True).clamp_min(1e-12)
