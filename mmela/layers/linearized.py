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

    These are methods that make self-attention linear in the number of tokens, applied
    to the blocks of a stage. The authors of KCLA compare with them. In each head a
    product of features of query and key replaces the softmax of :class:`MLA`, and the
    weights need not sum to 1:

    .. math::
        O^t = \sum_{s \le t} (\phi(q^t) \cdot \phi(k^s)) f_V^t(X^s)

    - ``'linear'``: :math:`\phi(x) = \mathrm{elu}(x) + 1` (linear attention,
      Katharopoulos et al., 2020).
    - ``'focused'``: the squares of :math:`\mathrm{ReLU}(x) / a`, rescaled to the norm
      before squaring, with learned :math:`a` and a learned position added to
      :math:`X^t` (FLatten, Han et al., 2023).
    - ``'hydra'``: :math:`\phi(x) = x / \lVert x \rVert` over all channels, with one
      head per channel (Hydra attention, Bolya et al., 2022).
    - ``'performer'``: sines and cosines of 8 random projections (random features as
      in Performers, Choromanski et al., 2021), drawn once and stored in the
      checkpoint.
    - ``'linformer'``: from the fourth block on, a softmax over two learned mixtures
      of all keys and of all values (Linformer, Wang et al., 2020).

    Each block has its own transforms, so no partial sum carries over to the next
    block: cost and memory grow with the square of the number of blocks, as KCLA notes
    (section V-D).

    The authors' implementations differ in details: their performer keeps the keys and
    values of earlier blocks, and their Linformer has biases in the mixtures.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. The authors use 8 for
            ``'linear'`` and 16 for the others. Defaults to 32.
        kind (str): The method, see above. Defaults to ``'linear'``.
        block (int): Index of the block in its stage. The backbone sets it. Defaults
            to 0.
        **kwargs: See :class:`MLA`. The authors use ``relu=False`` for ``'focused'``
            and ``'hydra'``.

    Raises:
        ValueError: If ``kind`` is unknown, and as in :class:`MLA`.
    """

    prunable = False

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

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        if hasattr(self, 'position'):  # the parent's constructor calls this too early
            nn.init.zeros_(self.position)
            nn.init.zeros_(self.spread)
        if hasattr(self, 'mix_keys'):
            self.mix_keys.reset_parameters()
            self.mix_values.reset_parameters()

    def store(self, x: Tensor, memory: MLA.Memory) -> None:
        """Add the output of the block to the memory."""
        super().store(x + self.position if self.kind == 'focused' else x, memory)

    def weights(self, query: Tensor, keys: Tensor, memory: MLA.Memory) -> Tensor:
        """Weights of the blocks.

        Args:
            query (Tensor): (B, G, 1, d).
            keys (Tensor): (B, G, t, d).
            memory (StageMemory): Not used, because there is no distribution.

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
        """Weights from two mixtures of keys and two of values."""
        if not hasattr(self, 'mix_keys'):
            scores = (query * keys).sum(-1) / math.sqrt(query.shape[-1])
            return scores.softmax(-1)
        count = keys.shape[2]  # fewer if earlier attentions are pruned
        mix = self.mix_keys.weight[:, :count].to(keys.dtype)
        scores = (query * (mix @ keys)).sum(-1) / math.sqrt(query.shape[-1])
        return scores.softmax(-1) @ self.mix_values.weight[:, :count].to(keys.dtype)

    def fingerprint(self) -> str:
        return f'{super().fingerprint()[:-1]}, kind={self.kind})'


def _norm(x: Tensor) -> Tensor:
    """Norm over all heads and channels, (B, G, t, d) to (B, 1, t, 1)."""
    return x.norm(dim=(1, 3), keepdim=True).clamp_min(1e-12)
