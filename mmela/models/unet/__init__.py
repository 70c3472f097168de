"""The U-Net of KCLA: encoder, decoder and loss. They need mmsegmentation."""

from .head import UNetHead
from .loss import ForegroundDiceLoss
from .network import ELAUNetResNet, UNetResNet

__all__ = ['ELAUNetResNet', 'ForegroundDiceLoss', 'UNetHead', 'UNetResNet']
