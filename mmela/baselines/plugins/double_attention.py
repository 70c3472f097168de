from mmengine.registry import MODELS
from torch import Tensor, nn

from .se import reduced


@MODELS.register_module()
class DoubleAttention(nn.Module):
    r"""Double attention (A2-Nets, Chen et al. 2018, eq. 6).

    Attention over positions gathers global descriptors, and attention over descriptors
    distributes them:

    .. math::
        Z = A(X) \, \mathrm{softmax}_{HW}(B(X))^T \,
            \mathrm{softmax}_{n}(V(X)), \quad X + W Z

    with 1x1 convolutions ``A``, ``B``, ``V`` and ``W``.

    Args:
        in_channels (int): Channels ``C`` of the input.
        reduction (int): ``C`` divided by the ``m = n`` channels of ``A``, ``B`` and
            ``V``. Defaults to 4.

    Raises:
        ValueError: If ``reduction`` leaves no channel.
    """

    def __init__(self, in_channels: int, reduction: int = 4) -> None:
        super().__init__()
        width = reduced(in_channels, reduction)
        self.gather = nn.Conv2d(in_channels, width, 1)
        self.attend = nn.Conv2d(in_channels, width, 1)
        self.distribute = nn.Conv2d(in_channels, width, 1)
        self.out = nn.Conv2d(width, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        features = self.gather(x).flatten(2)
        positions = self.attend(x).flatten(2).softmax(-1)
        vectors = self.distribute(x).flatten(2).softmax(1)
        descriptors = features @ positions.transpose(1, 2)
        return x + self.out((descriptors @ vectors).unflatten(2, x.shape[2:]))
