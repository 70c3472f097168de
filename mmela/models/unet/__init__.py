"""The U-Net of KCLA: network, decoder and loss; they need mmsegmentation."""

from .head import UNetHead
from .loss import ForegroundDiceLoss
from .network import ELAUNetResNet, UNetResNet

__all__ = ['ELAUNetResNet', 'ForegroundDiceLoss', 'UNetHead', 'UNetResNet']
