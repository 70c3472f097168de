from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class UNetHead(BaseDecodeHead):
    """Decoder of a U-Net with bilinear upsampling.

    It starts from the deepest feature map. Each step resizes the current map to the
    next finer map of the encoder, concatenates the two along the channels, and applies
    two 3x3 convolutions. The last step works at the resolution of the finest map.

    MMSegmentation's ``UNet`` holds encoder and decoder in one backbone and learns a
    convolution at each upsampling; the networks of KCLA (section V-C) do not.

    Args:
        in_channels (Sequence[int]): Channels of the encoder's feature maps,
            finest first. Defaults to (16, 32, 64, 128, 128).
        decoder_channels (Sequence[int]): Channels after each step, deepest
            first; one entry fewer than ``in_channels``. Defaults to
            (64, 32, 16, 16).
        norm_cfg (dict): Config of the normalizations. Defaults to
            ``dict(type='BN')``.
        scale (int, optional): Enlarge by this factor at each step and crop or pad at
            the centre, instead of resizing to the next map. The KCLA authors' U-Net
            doubles the size even if the next map is not larger. Defaults to None.
        init_cfg (dict, optional): Initialization config. Defaults to None, which
            keeps the default initialization of each layer; ``BaseDecodeHead`` would
            give the last convolution tiny weights, which grow slowly.
        **kwargs: All further arguments of ``BaseDecodeHead`` except ``channels``,
            ``in_index`` and ``input_transform``, which follow from these.

    Raises:
        ValueError: If ``decoder_channels`` does not match ``in_channels``, or
            ``scale`` is less than 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (16, 32, 64, 128, 128),
        decoder_channels: Sequence[int] = (64, 32, 16, 16),
        norm_cfg: dict = dict(type='BN'),  # noqa: B006
        scale: Optional[int] = None,
        init_cfg: Optional[dict] = None,
        **kwargs,
    ) -> None:
        if len(in_channels) < 2 or len(decoder_channels) != len(in_channels) - 1:
            raise ValueError(
                f'decoder_channels={tuple(decoder_channels)} must have one '
                f'entry fewer than in_channels={tuple(in_channels)}, which '
                'must have at least two'
            )
        super().__init__(
            tuple(in_channels),
            decoder_channels[-1],
            in_index=tuple(range(len(in_channels))),
            input_transform='multiple_select',
            norm_cfg=norm_cfg,
            init_cfg=init_cfg,
            **kwargs,
        )
        if scale is not None and scale < 1:
            raise ValueError(f'scale={scale} is less than 1')
        self.scale = scale
        self.steps = nn.ModuleList()
        below = in_channels[-1]
        for skip, out in zip(in_channels[-2::-1], decoder_channels):
            self.steps.append(
                nn.Sequential(self._conv(skip + below, out), self._conv(out, out))
            )
            below = out

    def _conv(self, in_channels: int, out_channels: int) -> ConvModule:
        return ConvModule(
            in_channels,
            out_channels,
            3,
            padding=1,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )

    def forward(self, inputs: Tuple[Tensor, ...]) -> Tensor:
        """Decode the feature maps into class scores.

        Args:
            inputs (tuple[Tensor]): The encoder's feature maps, finest first,
                each (B, C_i, H_i, W_i).

        Returns:
            Tensor: (B, out_channels, H_0, W_0).
        """
        *skips, x = self._transform_inputs(inputs)
        for skip, step in zip(reversed(skips), self.steps):
            size = skip.shape[2:]
            if self.scale is not None:
                size = tuple(self.scale * side for side in x.shape[2:])
            # The last stage may have stride 1
            if x.shape[2:] != size:
                x = F.interpolate(
                    x, size=size, mode='bilinear', align_corners=self.align_corners
                )
            if x.shape[2:] != skip.shape[2:]:
                x = _centre(x, skip.shape[2], skip.shape[3])
            x = step(torch.cat((skip, x), dim=1))
        return self.cls_seg(x)


def _centre(x: Tensor, height: int, width: int) -> Tensor:
    """Crop maps to their centre, or pad them with zeros if they are smaller.

    Args:
        x (Tensor): (B, C, H, W).
        height (int): Height of the result.
        width (int): Its width.

    Returns:
        Tensor: (B, C, height, width).
    """
    rows, columns = height - x.shape[2], width - x.shape[3]
    pad = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return F.pad(x, pad)
