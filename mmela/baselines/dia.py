from dataclasses import dataclass
from typing import Optional, Tuple

from torch import Tensor

from ..layers import StageMemory
from ..layers.cells import BottleneckCell
from ..registry import LAYER_ATTENTIONS
from .branch import BranchAttention, pooled


@LAYER_ATTENTIONS.register_module()
class DIA(BranchAttention):
    r"""Dense-and-implicit attention (DIANet, Huang et al. 2020, eq. 7 and 8).

    One LSTM runs over the outputs of all blocks of a stage and scales their channels:

    .. math::
        (h^t, c^t) = \mathrm{LSTM}(\mathrm{GAP}(F^t), h^{t-1}, c^{t-1}), \quad
        X^{t+1} = \mathrm{ReLU}(X^t + h^t \odot F^t)

    Args:
        channels (int): Channels ``C`` of the block's output.
        reduction (int): Reduction factor of the LSTM: 4 on CIFAR, 20 on ImageNet.
            Defaults to 4.
        **kwargs: ``drop_path``, ``norm_cfg``, ``owns_shared`` and ``init_cfg``, see
            :class:`BranchAttention`.

    Raises:
        ValueError: If ``reduction`` exceeds ``channels``, and as in
            :class:`BranchAttention`.
    """

    @dataclass
    class Memory(StageMemory):
        """State of the LSTM.

        Attributes:
            state (tuple[Tensor, Tensor], optional): ``h`` and ``c``, each
                (B, C).
        """

        state: Optional[Tuple[Tensor, Tensor]] = None

    shared = ('cell',)

    def __init__(self, channels: int, reduction: int = 4, **kwargs) -> None:
        super().__init__(channels, **kwargs)
        self.reduction = reduction
        if self.owns_shared:
            self.cell = BottleneckCell(channels, reduction, output_gate=True)

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        memory.state = (memory.first or self).cell(pooled(x), memory.state)
        return x * memory.state[0][..., None, None]

    def fingerprint(self) -> str:
        return f'DIA(reduction={self.reduction})'
