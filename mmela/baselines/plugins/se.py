from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class SqueezeExcitation(nn.Module):
    r"""Squeeze and excitation (SENet, Hu et al. 2018, eq. 2 to 4).

    :math:`\sigma(W_2 \mathrm{ReLU}(W_1 \mathrm{GAP}(X))) \odot X`, without
    biases, as in the paper; MMPretrain's ``SELayer`` has them.

    Args:
        in_channels (int): Channels ``C`` of the input.
        reduction (int): Reduction factor of the hidden channels. Defaults to 16.

    Raises:
        ValueError: If ``reduction`` leaves no channel.
    """

    def __init__(self, in_channels: int, reduction: int = 16) -> None:
        super().__init__()
        width = reduced(in_channels, reduction)
        self.gate = nn.Sequential(
            nn.Linear(in_channels, width, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(width, in_channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return x * self.gate(x.mean((2, 3)))[..., None, None]


def reduced(channels: int, reduction: int) -> int:
    """Number of hidden channels.

    Args:
        channels (int): Number of input channels.
        reduction (int): Reduction factor.

    Returns:
        int: The quotient, rounded down.

    Raises:
        ValueError: If ``reduction`` is not from 1 to ``channels``.
    """
    if not 1 <= reduction <= channels:
        raise ValueError(
            f'reduction={reduction} leaves none of {channels} channels; allowed are '
            f'1 to {channels}'
        )
    return channels // reduction
