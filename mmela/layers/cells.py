"""The recurrent cell of DIA and of the dynamic sharing unit of DLA."""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn


class BottleneckCell(nn.Module):
    r"""An LSTM cell with bottleneck gates and a sigmoid output.

    .. math::
        (i, f, g, o) &= W_2 \mathrm{ReLU}(W_1 x) + U_2 \mathrm{ReLU}(U_1 h) \\
        c' &= \sigma(f) \odot c + \sigma(i) \odot \tanh(g), \quad
        h' = \sigma(o) \odot \sigma(c')

    This is the cell of DIA (section 3.2 there). The dynamic sharing unit of DLA
    (eq. 8 to 10) is the same without the gate :math:`o`.

    Args:
        channels (int): Channels of input and state.
        reduction (int): Factor by which the bottlenecks are narrower.
        output_gate (bool): Whether the cell has the gate :math:`o`.

    Raises:
        ValueError: If ``reduction`` leaves a bottleneck without a channel.
    """

    def __init__(self, channels: int, reduction: int, output_gate: bool) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(
                f'reduction={reduction} leaves none of {channels} channels; '
                f'allowed are 1 to {channels}'
            )
        gates = 4 if output_gate else 3

        def bottleneck() -> nn.Sequential:
            width = channels // reduction
            return nn.Sequential(
                nn.Linear(channels, width),
                nn.ReLU(inplace=True),
                nn.Linear(width, gates * channels),
            )

        self.input = bottleneck()
        self.hidden = bottleneck()
        self.gates = gates

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for module in (*self.input, *self.hidden):
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(
        self, x: Tensor, state: Optional[Tuple[Tensor, Tensor]] = None
    ) -> Tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            x (Tensor): Input, (B, C).
            state (tuple[Tensor, Tensor], optional): ``h`` and ``c``, each
                (B, C). Defaults to None, which means zeros.

        Returns:
            tuple[Tensor, Tensor]: The new ``h`` and ``c``, each (B, C).
        """
        if state is None:
            state = torch.zeros_like(x), torch.zeros_like(x)
        gates = (self.input(x) + self.hidden(state[0])).chunk(self.gates, 1)
        cell = gates[1].sigmoid() * state[1] + gates[0].sigmoid() * gates[2].tanh()
        hidden = cell.sigmoid()
        if len(gates) == 4:
            hidden = gates[3].sigmoid() * hidden
        return hidden, cell
