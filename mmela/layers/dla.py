from dataclasses import dataclass
from typing import Optional, Tuple

from torch import Tensor, nn

from ..registry import LAYER_ATTENTIONS
from .base import pool
from .cells import BottleneckCell
from .mrla_base import MRLABase
from .mrla_light import MRLALight

State = Tuple[Tensor, Tensor]


@LAYER_ATTENTIONS.register_module()
class DLALight(MRLALight):
    r"""Dynamic layer attention, light (DLA-L, Wang et al. 2024, section 3.4).

    It is :class:`MRLALight`, but each block first updates the earlier output that it
    adds. The update comes from the dynamic sharing unit (DSU) of the stage, a
    recurrent cell that takes one step per block:

    .. math::
        (h^t, c^t) &= \mathrm{DSU}(\mathrm{GAP}(X^t), h^{t-1}, c^{t-1}) \\
        \tilde O^{t-1} &= \mathrm{DSU}_h(\mathrm{GAP}(O^{t-1}), h^t, c^t)
            \odot O^{t-1} + \mathrm{DWConv}(O^{t-1}) \\
        Y^t &= X^t + \mathrm{BN}(\lambda_o^t \odot \tilde O^{t-1} +
            \sigma(q^t \cdot k^t / \sqrt d) V^t)

    :math:`O^{t-1}` is the identity input of the block after its downsample. The
    depth-wise convolution also belongs to the stage; the paper does not mention it, but
    the authors' networks have it.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        reduction (int): Reduction factor of the DSU: 4 on CIFAR, 16 on ImageNet.
            Defaults to 16.
        owns_shared (bool): Whether it is the first attention of its stage, which
            holds the DSU. Defaults to True.
        **kwargs: See :class:`MRLALight`.

    Raises:
        ValueError: If ``reduction`` exceeds ``channels``, and as in
            :class:`MRLALight`.
    """

    @dataclass
    class Memory(MRLALight.Memory):
        """The memory of MRLA-light plus the state of the DSU.

        Attributes:
            state (tuple[Tensor, Tensor], optional): State of the DSU, each
                (B, C).
        """

        state: Optional[State] = None

    shared = ('dsu', 'refresh')

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        reduction: int = 16,
        owns_shared: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(channels, head_dim, **kwargs)
        self.reduction = reduction
        if owns_shared:
            self.dsu = BottleneckCell(channels, reduction, output_gate=False)
            self.refresh = nn.Conv2d(
                channels, channels, 3, padding=1, groups=channels, bias=False
            )

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        if hasattr(self, 'dsu'):  # the parent's constructor calls this too early
            self.dsu.reset_parameters()
            self.refresh.reset_parameters()

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        shared = memory.first or self
        memory.state = shared.dsu(pool(x).squeeze(1), memory.state)
        name = 'identity' if self.needs_identity else 'output'
        previous = getattr(memory, name)
        if previous is not None:
            gate = shared.dsu(pool(previous).squeeze(1), memory.state)[0]
            refreshed = previous * gate[..., None, None] + shared.refresh(previous)
            setattr(memory, name, refreshed)
        return super().attend(x, memory)

    def fingerprint(self) -> str:
        return f'{super().fingerprint()[:-1]}, reduction={self.reduction})'


@LAYER_ATTENTIONS.register_module()
class DLABase(MRLABase):
    r"""Dynamic layer attention (DLA-B, Wang et al. 2024, section 3.3).

    It is :class:`MRLABase`, but each block first updates the keys and values in the
    memory, with the dynamic sharing unit (DSU) of the stage, see :class:`DLALight`:

    .. math::
        (h^t, c^t) &= \mathrm{DSU}(\mathrm{GAP}(X^t), h^{t-1}, c^{t-1}) \\
        k^s &\leftarrow \mathrm{DSU}_h(k^s, h^t, c^t) \odot k^s, \quad
        V^s \leftarrow \mathrm{DSU}_h(\mathrm{GAP}(V^s), h^t, c^t) \odot V^s
            \quad (s < t)

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        reduction (int): Reduction factor of the DSU: 4 on CIFAR, 16 on ImageNet.
            Defaults to 16.
        owns_shared (bool): Whether it is the first attention of its stage, which
            holds the DSU. Defaults to True.
        **kwargs: See :class:`MRLABase`.

    Raises:
        ValueError: If ``reduction`` exceeds ``channels``, and as in
            :class:`MRLABase`.
    """

    @dataclass
    class Memory(MRLABase.Memory):
        """The memory of MRLA-base plus the state of the DSU.

        Attributes:
            state (tuple[Tensor, Tensor], optional): State of the DSU, each
                (B, C).
        """

        state: Optional[State] = None

    shared = ('dsu',)

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        reduction: int = 16,
        owns_shared: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(channels, head_dim, **kwargs)
        self.reduction = reduction
        if owns_shared:
            self.dsu = BottleneckCell(channels, reduction, output_gate=False)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        if hasattr(self, 'dsu'):  # the parent's constructor calls this too early
            self.dsu.reset_parameters()

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        dsu = (memory.first or self).dsu
        memory.state = dsu(pool(x).squeeze(1), memory.state)
        memory.keys = [
            k * dsu(k.flatten(1).to(x.dtype), memory.state)[0].view_as(k)
            for k in memory.keys
        ]
        memory.values = [
            v * dsu(pool(v).squeeze(1), memory.state)[0][..., None, None]
            for v in memory.values
        ]
        return super().attend(x, memory)

    def fingerprint(self) -> str:
        return f'{super().fingerprint()[:-1]}, reduction={self.reduction})'
