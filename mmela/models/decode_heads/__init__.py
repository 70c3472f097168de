"""Decoder and loss for segmentation; they need mmsegmentation."""

from .foreground_dice_loss import ForegroundDiceLoss
from .unet_head import UNetHead

__all__ = ['ForegroundDiceLoss', 'UNetHead']
