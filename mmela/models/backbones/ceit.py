from typing import Tuple

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, ModuleList
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.models.utils import resize_pos_embed, to_2tuple
from mmpretrain.registry import MODELS
from torch import Tensor, nn


class Image2Tokens(BaseModule):
    """Stem of CeiT: a convolution, a pooling layer, and patches of the result.

    Args:
        in_channels (int): Channels of the images.
        stem_channels (int): Channels of the convolution.
        embed_dims (int): Channels of the tokens.
        patch_size (int): Side of a patch in pixels of the image, a multiple of 4,
            since the stem divides the resolution by 4.
        img_size (int | tuple): Size of the images.
    """

    def __init__(
        self,
        in_channels: int,
        stem_channels: int,
        embed_dims: int,
        patch_size: int,
        img_size,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, stem_channels, 7, 2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(stem_channels)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        side = patch_size // 4
        self.projection = nn.Conv2d(stem_channels, embed_dims, side, side)
        self.init_out_size = tuple(s // patch_size for s in to_2tuple(img_size))

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        """Map images, (B, 3, H, W), to tokens, (B, L, C), and the size of their map."""
        x = self.projection(self.pool(self.bn(self.conv(x))))
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])


class LocallyEnhancedFeedForward(BaseModule):
    """Feed-forward of CeiT, with a depth-wise convolution over the patches.

    The class token stays unchanged.

    Args:
        embed_dims (int): Channels of the tokens.
        feedforward_channels (int): Hidden channels.
    """

    def __init__(self, embed_dims: int, feedforward_channels: int) -> None:
        super().__init__()
        wide = feedforward_channels
        self.layers = nn.Sequential(
            nn.Conv2d(embed_dims, wide, 1),
            nn.BatchNorm2d(wide),
            nn.GELU(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide),
            nn.BatchNorm2d(wide),
            nn.GELU(),
            nn.Conv2d(wide, embed_dims, 1),
            nn.BatchNorm2d(embed_dims),
        )

    def forward(self, x: Tensor, size: Tuple[int, int]) -> Tensor:
        """Map (B, 1 + L, C) to the same shape; ``size`` is that of the patch map."""
        token, patches = x[:, :1], x[:, 1:].transpose(1, 2).unflatten(2, size)
        patches = self.layers(patches).flatten(2).transpose(1, 2)
        return torch.cat([token, patches], dim=1)


class CeiTLayer(TransformerEncoderLayer):
    """Self-attention and locally-enhanced feed-forward.

    Args:
        embed_dims (int): Channels of the tokens.
        num_heads (int): Heads of the self-attention.
        feedforward_channels (int): Hidden channels of the feed-forward.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
        **kwargs: ``drop_rate``, ``attn_drop_rate``, ``qkv_bias`` and
            ``norm_cfg`` of MMPretrain's ``TransformerEncoderLayer``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        drop_path_rate: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(
            embed_dims,
            num_heads,
            feedforward_channels,
            drop_path_rate=drop_path_rate,
            **kwargs,
        )
        self.ffn = LocallyEnhancedFeedForward(embed_dims, feedforward_channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, size: Tuple[int, int]) -> Tensor:
        """Map (B, 1 + L, C) to the same shape; ``size`` is that of the patch map."""
        x = x + self.attn(self.ln1(x))
        return x + self.drop_path(self.ffn(self.ln2(x), size))


class LayerwiseClassTokenAttention(TransformerEncoderLayer):
    """Attention of the last class token over the class tokens of all layers.

    It is a transformer layer that computes only the last token.

    Args:
        embed_dims (int): Channels of the tokens.
        num_heads (int): Heads of the attention.
        feedforward_channels (int): Hidden channels of the feed-forward.
        num_layers (int): Number of class tokens.
        **kwargs: Arguments of MMPretrain's ``TransformerEncoderLayer``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        num_layers: int,
        **kwargs,
    ) -> None:
        super().__init__(embed_dims, num_heads, feedforward_channels, **kwargs)
        # Only in the authors' code, not in the paper
        self.pos_embed = nn.Parameter(torch.zeros(1, num_layers, embed_dims))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T, C) to (B, C)."""
        tokens = tokens + self.pos_embed
        normed = self.ln1(tokens)
        attn = self.attn
        batch, depth, dims = tokens.shape
        weight = attn.qkv.weight.split(dims)
        bias = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.split(dims)
        query, key, value = (
            nn.functional.linear(x, w, b)
            .view(batch, -1, attn.num_heads, attn.head_dims)
            .transpose(1, 2)
            for x, w, b in zip((normed[:, -1:], normed, normed), weight, bias)
        )
        drop = attn.attn_drop if self.training else 0.0
        out = attn.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        out = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(batch, 1, dims)))
        x = tokens[:, -1:] + out
        return self.ffn(self.ln2(x), identity=x)[:, 0]


@MODELS.register_module()
class CeiT(VisionTransformer):
    """CeiT, a vision transformer with convolutions (Yuan et al., 2021).

    `Incorporating Convolution Designs into Visual Transformers
    <https://arxiv.org/abs/2103.11816>`_: a convolutional stem computes the tokens
    (I2T), the feed-forward has a depth-wise convolution (LeFF), and a final attention
    runs over the class tokens of all layers (LCA).

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, or a dict as for MMPretrain's
            ``VisionTransformer``. Defaults to ``'tiny'``.
        img_size (int | tuple): Image size, to which the position embedding belongs.
            Defaults to 224.
        patch_size (int): Side of a patch. Defaults to 16.
        in_channels (int): Channels of an image. Defaults to 3.
        stem_channels (int): Channels of the stem. Defaults to 64, as in the
            authors' code, which MRLA's networks follow; CeiT's paper has 32.
        drop_rate (float): Dropout rate. Defaults to 0.
        drop_path_rate (float): Stochastic depth rate of the last layer. Defaults
            to 0.
        qkv_bias (bool): Whether query, key and value have biases. Defaults to True.
        norm_cfg (dict): Normalization of the tokens. Defaults to
            ``dict(type='LN', eps=1e-6)``.
        frozen_stages (int): Number of layers to freeze, together with everything
            before them; -1 for none. Defaults to -1.
        interpolate_mode (str): Interpolation of the position embedding. Defaults
            to ``'bicubic'``.
        init_cfg (dict | list, optional): Initialization config. Defaults to
            None.

    Raises:
        ValueError: If ``arch`` is unknown or ``patch_size`` is not a multiple
            of 4.

    Example:
        >>> import torch
        >>> from mmpretrain.registry import MODELS
        >>> import mmela
        >>> backbone = MODELS.build(dict(type='CeiT', arch='tiny'))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 224, 224))]
        [(1, 192)]
    """

    ARCHS = {
        name: dict(
            embed_dims=dims,
            num_layers=12,
            num_heads=dims // 64,
            feedforward_channels=4 * dims,
        )
        for name, dims in (('tiny', 192), ('small', 384))
    }

    def __init__(
        self,
        arch='tiny',
        img_size=224,
        patch_size: int = 16,
        in_channels: int = 3,
        stem_channels: int = 64,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        norm_cfg: dict = dict(type='LN', eps=1e-6),  # noqa: B006
        frozen_stages: int = -1,
        interpolate_mode: str = 'bicubic',
        init_cfg=None,
    ) -> None:
        if isinstance(arch, str):
            if arch not in self.ARCHS:
                raise ValueError(
                    f'arch={arch!r} is unknown; allowed are {", ".join(self.ARCHS)}, '
                    'or a dict'
                )
            arch = self.ARCHS[arch]
        if patch_size < 4 or patch_size % 4:
            raise ValueError(
                f'patch_size={patch_size} is not a multiple of 4, the factor by which '
                'the stem reduces the image'
            )
        super().__init__(
            arch=dict(arch),
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            qkv_bias=qkv_bias,
            norm_cfg=norm_cfg,
            interpolate_mode=interpolate_mode,
            init_cfg=init_cfg,
        )
        self.patch_embed = Image2Tokens(
            in_channels, stem_channels, self.embed_dims, patch_size, img_size
        )
        sizes = dict(
            embed_dims=self.embed_dims,
            num_heads=arch['num_heads'],
            feedforward_channels=arch['feedforward_channels'],
            drop_rate=drop_rate,
            qkv_bias=qkv_bias,
            norm_cfg=norm_cfg,
        )
        rates = torch.linspace(0, drop_path_rate, self.num_layers).tolist()
        self.layers = ModuleList(
            [CeiTLayer(drop_path_rate=rate, **sizes) for rate in rates]
        )
        self.lca = LayerwiseClassTokenAttention(num_layers=self.num_layers, **sizes)
        self.frozen_stages = frozen_stages
        if frozen_stages > 0:
            self._freeze_stages()

    def forward(self, x: Tensor) -> Tuple[Tensor]:
        """Compute the class token.

        Args:
            x (Tensor): Images, (B, 3, H, W).

        Returns:
            tuple[Tensor]: The class token after all layers, (B, C).
        """
        x, size = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + resize_pos_embed(
            self.pos_embed,
            self.patch_resolution,
            size,
            mode=self.interpolate_mode,
            num_extra_tokens=1,
        )
        x = self.drop_after_pos(x)
        tokens = []
        for layer in self.layers:
            x = layer(x, size)
            tokens.append(x[:, 0])
        return (self.ln1(self.lca(torch.stack(tokens, dim=1))),)
