"""Attentions over the residual branch of a block, before the sum."""

from typing import Any, Dict, List, Optional, Tuple

import torch
from mmcv.cnn import build_plugin_layer
from torch import Tensor, nn

from ..registry import LAYER_ATTENTIONS
from .base import LayerAttention, StageMemory


class BranchAttention(LayerAttention):
    """Attention over the residual branch of a block.

    What :meth:`forward` returns takes the place of the branch ``F(X)`` in
    ``X + F(X)``. For blocks of ResNet and of its relatives, and for those of
    EfficientNet.

    Args:
        channels (int): Channels ``C`` of the block's output.
        drop_path (float): Probability of leaving the branch of a sample as it
            is in training; where it is not, its change is scaled up in turn.
            Defaults to 0.
        norm_cfg (dict, optional): Normalization, of attentions that have one.
            Defaults to ``dict(type='BN')``.
        first (LayerAttention, optional): The first attention of the stage, if
            that holds parameters for this one, too. Defaults to None.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: If ``drop_path`` is not in [0, 1).
    """

    before_sum = True

    def __init__(
        self,
        channels: int,
        drop_path: float = 0.0,
        norm_cfg: Optional[dict] = dict(type='BN'),  # noqa: B006
        first: Optional[LayerAttention] = None,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(channels, 1, drop_path, init_cfg)
        # In a tuple, so that it does not become a submodule
        self._first: Tuple[LayerAttention, ...] = (first,) if first else ()

    @property
    def first(self) -> 'BranchAttention':
        """BranchAttention: Who holds what the attentions of a stage share."""
        return self._first[0] if self._first else self

    def connect(self, block: nn.Module) -> List[Tuple[nn.Module, str]]:
        return [(branch_end(block), 'replace')]

    def replace(self, x: Tensor, branch: Tensor, memory: StageMemory) -> Tensor:
        """Attend over the branch.

        Args:
            x (Tensor): Input of the last module of the branch, not used.
            branch (Tensor): The branch ``F(X)``, (B, C, H, W).
            memory (StageMemory): Memory of the stage.

        Returns:
            Tensor: What takes the place of the branch, (B, C, H, W).
        """
        out = self(branch, memory)
        if isinstance(self.drop_path, nn.Identity) or not self.training:
            return out
        return branch + self.drop_path(out - branch)

    def signature(self) -> str:
        return f'{type(self).__name__}()'


@LAYER_ATTENTIONS.register_module()
class Plugin(BranchAttention):
    """A plugin of mmcv on the residual branch of a block.

    The toolboxes have no layer attention there but plugins, MMPretrain not
    even those: this brings any to every backbone, and ``attention_blocks`` of
    the backbone says to which blocks. Those of mmela are
    ``SqueezeExcitation``, ``ECA``, ``CBAM``, ``BAM`` and ``DoubleAttention``;
    mmcv has ``ContextBlock`` and ``NonLocal2d``.

    Args:
        channels (int): Channels ``C`` of the block's output.
        plugin (dict): Config of the plugin; ``in_channels`` is filled in.
        **kwargs: ``drop_path``, ``norm_cfg`` and ``init_cfg``, see
            :class:`BranchAttention`.

    Raises:
        KeyError: If there is no such plugin.
        TypeError: If ``plugin`` is not a dict with a ``type``.
    """

    needs_memory = False

    def __init__(self, channels: int, plugin: Optional[dict] = None, **kwargs) -> None:
        if not isinstance(plugin, dict) or 'type' not in plugin:
            raise TypeError(
                "plugin must be a dict with a type such as dict(type='ECA'), "
                f'got {plugin}'
            )
        super().__init__(channels, **kwargs)
        self.config = dict(plugin)
        self.plugin = build_plugin_layer(self.config, in_channels=channels)[1]

    def forward(self, x: Tensor, memory: Optional[StageMemory] = None) -> Tensor:
        return self.plugin(x)

    def signature(self) -> str:
        return f'Plugin({self.config["type"]})'


def branch_end(block: nn.Module) -> nn.Module:
    """The submodule of a block whose output is the residual branch.

    Args:
        block (nn.Module): A block of ResNet or a relative, or of EfficientNet.

    Returns:
        nn.Module: Its last normalization, or last convolution with one.

    Raises:
        ValueError: If the block is of another kind.
    """
    for name in ('norm3', 'norm2', 'linear_conv', 'conv2'):
        module = getattr(block, name, None)
        if module is not None:
            return module
    raise ValueError(
        f'where the residual branch of a {type(block).__name__} ends is not known; '
        'allowed are the blocks of ResNet, its relatives, and EfficientNet'
    )


def convolutions(block: nn.Module) -> Dict[str, Any]:
    """Convolutions of a block of ResNet by name, in order.

    Args:
        block (nn.Module): The block.

    Returns:
        dict[str, nn.Module]: ``conv1``, ``conv2`` and ``conv3`` as far as it
        has them.

    Raises:
        ValueError: If ``conv1`` is no convolution: a block of another kind.
    """
    found = {
        name: getattr(block, name)
        for name in ('conv1', 'conv2', 'conv3')
        if hasattr(getattr(block, name, None), 'in_channels')
    }
    if not hasattr(block, 'norm1') or 'conv1' not in found:
        raise ValueError(
            f'a {type(block).__name__} is no block of ResNet or of a relative'
        )
    return found


def pooled(x: Tensor) -> Tensor:
    """Global average pooling, (B, C, H, W) to (B, C)."""
    return torch.flatten(x.mean((2, 3)), 1)
