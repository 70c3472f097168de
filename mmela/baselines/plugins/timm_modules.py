from importlib import import_module

from mmengine.registry import MODELS
from torch import Tensor, nn


class _TimmModule(nn.Module):
    """An attention module from timm, which is imported only when needed."""

    source = ''

    def __init__(self, in_channels: int, **kwargs) -> None:
        super().__init__()
        file, _, name = type(self).source.partition('.')
        try:
            layers = import_module(f'timm.layers.{file}')
        except ImportError as error:
            raise ImportError(
                f'{type(self).__name__} needs timm, which is not installed; install '
                'it with: pip install "mmela[timm]"'
            ) from error
        self.module = getattr(layers, name)(in_channels, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return self.module(x)


@MODELS.register_module()
class ECA(_TimmModule):
    """Efficient channel attention (ECA-Net, Wang et al. 2020, eq. 5 and 12).

    This is timm's ``EcaModule``: a 1-D convolution over the pooled channels, with a
    kernel size that depends on their number.

    Args:
        in_channels (int): Channels ``C`` of the input.
        **kwargs: Further arguments of ``EcaModule``.

    Raises:
        ImportError: If timm is not installed.
    """

    source = 'eca.EcaModule'


@MODELS.register_module()
class CBAM(_TimmModule):
    """Convolutional block attention (CBAM, Woo et al. 2018, eq. 1 to 3).

    This is timm's ``CbamModule``: attention over channels, then over positions.

    Args:
        in_channels (int): Channels ``C`` of the input.
        **kwargs: Further arguments of ``CbamModule``.

    Raises:
        ImportError: If timm is not installed.
    """

    source = 'cbam.CbamModule'
