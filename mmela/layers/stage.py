from typing import Callable, List, Optional

from mmengine.model import Sequential
from torch import Tensor

from .base import LayerAttention, LayerMemory


class LayerAttentionStage(Sequential):
    """The residual blocks of one stage, each followed by its layer attention.

    A block carries its attention as ``layer_attn``; a block without one is a
    plain residual block.

    Attributes:
        observer (callable, optional): Called after each forward pass with the
            scores of the active attentions, a list of (B, G, t) tensors
            without gradient. Defaults to None, which costs nothing.
    """

    observer: Optional[Callable[[List[Tensor]], None]] = None

    @property
    def attentions(self) -> List[LayerAttention]:
        """list[LayerAttention]: The layer attentions of the blocks, in order;
        pruned ones too."""
        return [b.layer_attn for b in self if hasattr(b, 'layer_attn')]

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order.

        Args:
            x (Tensor): Input of the stage, (B, C_in, H_in, W_in).

        Returns:
            Tensor: Output of the last block, (B, C, H, W).
        """
        memory = LayerMemory()
        for block in self:
            x = block(x)
            attention = getattr(block, 'layer_attn', None)
            if attention is not None:
                x = attention(x, memory)
        if self.observer is not None:
            self.observer([scores.detach() for scores in memory.scores])
        return x
