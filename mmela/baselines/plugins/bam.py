from mmengine.registry import MODELS
from torch import Tensor, nn

from .se import reduced


@MODELS.register_module()
class BAM(nn.Module):
    r"""Bottleneck attention module (BAM, Park et al. 2018, eq. 1 to 4).

    :math:`X + \sigma(M_c(X) + M_s(X)) \odot X` with

    .. math::
        M_c(X) = \mathrm{BN}(W_1 \mathrm{ReLU}(W_0 \mathrm{GAP}(X) + b_0) + b_1),
        \quad
        M_s(X) = \mathrm{BN}(f_3^{1 \times 1}(f_2^{3 \times 3}(
            f_1^{3 \times 3}(f_0^{1 \times 1}(X)))))

    The 3x3 convolutions are dilated, and a BN and a ReLU follow each of :math:`f_0` to
    :math:`f_2`, as in the authors' code.

    Args:
        in_channels (int): Channels ``C`` of the input.
        reduction (int): Reduction factor of the hidden channels. Defaults to 16.
        dilation (int): Dilation of the 3x3 convolutions. Defaults to 4.

    Raises:
        ValueError: If ``reduction`` leaves no channel.
    """

    def __init__(
        self, in_channels: int, reduction: int = 16, dilation: int = 4
    ) -> None:
        super().__init__()
        width = reduced(in_channels, reduction)
        self.channel = nn.Sequential(
            nn.Linear(in_channels, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, in_channels),
            nn.BatchNorm1d(in_channels),
        )
        layers = _conv(in_channels, width)
        for _ in range(2):
            layers += _conv(width, width, 3, padding=dilation, dilation=dilation)
        self.spatial = nn.Sequential(*layers, nn.Conv2d(width, 1, 1), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        channel = self.channel(x.mean((2, 3)))[..., None, None]
        return x * (1 + (channel + self.spatial(x)).sigmoid())


def _conv(channels: int, out: int, size: int = 1, **kwargs) -> list:
    conv = nn.Conv2d(channels, out, size, **kwargs)
    return [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
