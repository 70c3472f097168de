from typing import List

from mmengine.registry import MODELS
from torch import Tensor

from .base import LayerMemory
from .mrla_base import MRLABase


@MODELS.register_module(force=True)  # instead of its placeholder
class MLA(MRLABase):
    r"""Multi-head layer attention, the quadratic original (MRLA, eq. 3 and 4).

    Unlike in :class:`MRLABase`, block ``t`` computes the keys and values of
    all blocks of its stage so far with its own transforms:

    .. math::
        a^t = \mathrm{softmax}_{s \le t}(f_Q^t(X^t) \cdot f_K^t(X^s) /
              \sqrt d), \quad
        O^t = \sum_{s \le t} a^t_s f_V^t(X^s), \quad
        Y^t = X^t + \mathrm{DropPath}(\mathrm{ReLU}(\mathrm{BN}(O^t)))

    So each block of a stage costs as many value convolutions as there are
    blocks before it. :math:`X^s` is a block's output before its attention.

    An attention pruned with ``keep_value`` lets the later ones go on to see
    its block's output; no parameter of its own is needed for that.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        **kwargs: See :class:`MRLABase`.

    Raises:
        ValueError: As :class:`MRLABase` does.
    """

    def retained_parameters(self) -> List[str]:
        return []

    def store(self, x: Tensor, memory: LayerMemory) -> None:
        memory.inputs.append(x)
        memory.pooled.append(self._pool(x))

    def retrieve(self, x: Tensor, memory: LayerMemory) -> Tensor:
        self.store(x, memory)
        keys = [self._split(self.key(y)) for y in memory.pooled]
        values = [self._value(y) for y in memory.inputs]
        return self._attend(memory.pooled[-1], keys, values, memory)
