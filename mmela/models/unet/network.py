from typing import Sequence, Tuple

from mmseg.models.backbones import ResNet
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..backbones.mixin import LayerAttentionMixin


@MODELS.register_module()
class UNetResNet(ResNet):
    """A narrow ResNet as the encoder of a U-Net.

    The stem keeps the resolution of the image, and its output is one of the feature
    maps, for the last skip connection. Each stage has its own width and stride. The
    defaults are those of KCLA's segmentation networks (section V-C; the authors' code
    for the stem and the strides); the whole U-Net then has 1.53 M parameters.

    Args:
        depth (int): Depth of the ResNet: 18, 34, 50, 101 or 152. Defaults to
            18.
        stem_channels (int): Channels of the stem. Defaults to 16.
        stage_channels (Sequence[int]): Channels of the stages, before the
            expansion of a bottleneck. Defaults to (32, 64, 128, 128).
        strides (Sequence[int]): Strides of the stages. Defaults to
            (2, 2, 2, 1).
        **kwargs: All further arguments of ``mmseg.models.ResNet`` except
            ``base_channels``, which would have no effect.

    Raises:
        TypeError: If ``base_channels`` is given.
        ValueError: If ``stage_channels`` or ``strides`` does not have one entry
            per stage.

    Example:
        >>> import torch
        >>> from mmseg.registry import MODELS
        >>> import mmela
        >>> encoder = MODELS.build(dict(type='UNetResNet'))
        >>> [tuple(x.shape[1:]) for x in encoder(torch.rand(1, 3, 64, 64))]
        [(16, 64, 64), (32, 32, 32), (64, 16, 16), (128, 8, 8), (128, 8, 8)]
    """

    def __init__(
        self,
        depth: int = 18,
        stem_channels: int = 16,
        stage_channels: Sequence[int] = (32, 64, 128, 128),
        strides: Sequence[int] = (2, 2, 2, 1),
        **kwargs,
    ) -> None:
        if 'base_channels' in kwargs:
            raise TypeError(
                'base_channels has no effect on a UNetResNet; set the width of each '
                'stage with stage_channels'
            )
        num_stages = kwargs.get('num_stages', 4)
        for name, value in (('stage_channels', stage_channels), ('strides', strides)):
            if len(value) != num_stages:
                raise ValueError(
                    f'{name}={tuple(value)} must have one entry for each of the '
                    f'{num_stages} stages'
                )
        # The constructor of ResNet calls make_res_layer, which needs this.
        self.stage_channels = tuple(stage_channels)
        super().__init__(depth, stem_channels=stem_channels, strides=strides, **kwargs)
        self.feat_dim = self.stage_channels[-1] * self.block.expansion

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        super()._make_stem_layer(in_channels, stem_channels)
        conv = self.stem[0] if self.deep_stem else self.conv1
        conv.stride = (1, 1)
        del self.maxpool

    def _set_widths(self, kwargs: dict) -> dict:
        """Arguments of ``make_res_layer`` with this network's widths.

        ResNet's constructor doubles the width from stage to stage.
        """
        stage = len(self.res_layers)
        if stage:
            before = self.stage_channels[stage - 1] * self.block.expansion
        else:
            before = self.stem_channels
        return {**kwargs, 'inplanes': before, 'planes': self.stage_channels[stage]}

    def make_res_layer(self, **kwargs) -> nn.Module:
        """Build the blocks of a stage."""
        return super().make_res_layer(**self._set_widths(kwargs))

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute the feature maps that a U-Net connects to its decoder.

        Args:
            x (Tensor): Images, (B, 3, H, W).

        Returns:
            tuple[Tensor]: Output of the stem, (B, C, H, W), and of each stage
            in ``out_indices``, (B, C_i, H_i, W_i).
        """
        if self.deep_stem:
            x = self.stem(x)
        else:
            x = self.relu(self.norm1(self.conv1(x)))
        outs = [x]
        for index, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if index in self.out_indices:
                outs.append(x)
        return tuple(outs)


@MODELS.register_module()
class ELAUNetResNet(LayerAttentionMixin, UNetResNet):
    """:class:`UNetResNet` with a layer attention after each block.

    Args:
        layer_attention (dict): Config of the layer attention, see
            :class:`mmela.layers.MRLABase`. KCLA's segmentation networks use
            ``head_dim=16`` (section V-C). Defaults to ``dict(type='MRLABase')``.
        **kwargs: All further arguments of :class:`UNetResNet` and of
            :class:`.LayerAttentionMixin`.

    Example:
        >>> import torch
        >>> from mmseg.registry import MODELS
        >>> import mmela
        >>> encoder = MODELS.build(dict(
        ...     type='ELAUNetResNet',
        ...     layer_attention=dict(type='MRLALight', head_dim=16)))
        >>> [tuple(x.shape[1:]) for x in encoder(torch.rand(1, 3, 64, 64))]
        [(16, 64, 64), (32, 32, 32), (64, 16, 16), (128, 8, 8), (128, 8, 8)]
    """
