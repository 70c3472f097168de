"""Attention modules on the residual branch of a block, before the sum."""

from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_plugin_layer
from torch import Tensor, nn

from ..arguments import building
from ..layers import LayerAttention, StageMemory
from ..registry import LAYER_ATTENTIONS

Taps = Dict[str, str]
Replacements = Dict[str, nn.Module]


class BranchAttention(LayerAttention):
    """Base class of attention on the residual branch of a block.

    The result of :meth:`attend` replaces the branch ``F(X)`` in ``X + F(X)``. It works
    in blocks of the ResNet family and of EfficientNet.

    Args:
        channels (int): Channels ``C`` of the block's output.
        drop_path (float): Probability of not changing the branch of a sample in
            training; otherwise the change is scaled up to compensate. Defaults to 0.
        norm_cfg (dict, optional): Normalization, for attentions that have one.
            Defaults to ``dict(type='BN')``.
        owns_shared (bool): Whether it is the first attention of its stage, which
            holds the shared submodules. Defaults to True.
        init_cfg (dict | list[dict], optional): Initialization config. Defaults
            to None.

    Raises:
        ValueError: If ``drop_path`` is not in [0, 1).
    """

    needs_memory = True
    """bool: Whether it uses the memory of its stage, which rules out activation
    checkpointing, because that runs a block twice."""

    def __init__(
        self,
        channels: int,
        drop_path: float = 0.0,
        norm_cfg: Optional[dict] = dict(type='BN'),  # noqa: B006
        owns_shared: bool = True,
        init_cfg: Union[dict, List[dict], None] = None,
    ) -> None:
        super().__init__(channels, 1, drop_path, init_cfg)
        self.owns_shared = owns_shared

    def connect(self, block: nn.Module) -> Tuple[Taps, Replacements]:
        if self.place is not None and self.place.features.layout != 'BCHW':
            raise ValueError(
                f'{type(self).__name__} works on the residual branch of maps '
                f'(B, C, H, W), but {self.place.block} returns '
                f'{self.place.features.layout}; use an attention from mmela.layers'
            )
        if self.needs_memory and getattr(block, 'with_cp', False):
            raise ValueError(
                f'with_cp=True runs a block twice, but {type(self).__name__} changes '
                'the memory of its stage within the block; set with_cp=False'
            )
        return {branch_end(block): 'replace_branch'}, {}

    def replace_branch(
        self, x: Tensor, branch: Tensor, memory: Optional[StageMemory]
    ) -> Optional[Tensor]:
        """Attend over the branch.

        Args:
            x (Tensor): Input of the last module of the branch, not used.
            branch (Tensor): The branch ``F(X)``, (B, C, H, W).
            memory (StageMemory, optional): Memory of the stage; None if the module
                runs outside of its block.

        Returns:
            Tensor | None: The new branch, (B, C, H, W); None for no change.
        """
        if self.runs_alone(memory):
            return None
        out = self.attend(branch, memory)
        if isinstance(self.drop_path, nn.Identity) or not self.training:
            return out
        return branch + self.drop_path(out - branch)

    def runs_alone(self, memory: Optional[StageMemory]) -> bool:
        """Whether a submodule runs outside of its block, so there is nothing to do.

        Args:
            memory (StageMemory, optional): Memory of the stage, if the block runs.

        Returns:
            bool: True if it does.

        Raises:
            RuntimeError: If activation checkpointing runs the submodule again, since
                the result would differ from the first run.
        """
        if memory is not None or not self.needs_memory:
            return False
        if getattr(torch._C, '_current_graph_task_id', lambda: -1)() != -1:
            raise RuntimeError(
                f'layer attention: {type(self).__name__} changes the memory of its '
                f'stage within {self.place.block}, which activation checkpointing '
                'runs twice; turn checkpointing off there'
            )
        return True

    def update(self, features: Tensor, memory: Any, args: tuple, output: Any) -> Tensor:
        """Return the features unchanged, since the work is done within the block."""
        return features

    def fingerprint(self) -> str:
        return f'{type(self).__name__}()'


@LAYER_ATTENTIONS.register_module()
class Plugin(BranchAttention):
    """A plugin of mmcv on the residual branch of a block.

    Only some backbones of the toolboxes take plugins, and none of MMPretrain. This
    class adds any plugin to every backbone; ``blocks`` of the backbone selects the
    blocks. mmela has the plugins ``SqueezeExcitation``, ``ECA``, ``CBAM``, ``BAM`` and
    ``DoubleAttention``; mmcv has ``ContextBlock`` and ``NonLocal2d``.

    Args:
        channels (int): Channels ``C`` of the block's output.
        plugin (dict): Config of the plugin, without ``in_channels``.
        **kwargs: ``drop_path``, ``norm_cfg`` and ``init_cfg``, see
            :class:`BranchAttention`.

    Raises:
        KeyError: If the plugin is not registered.
        TypeError: If ``plugin`` is not a dict with a ``type``.
    """

    needs_memory = False

    def __init__(self, channels: int, plugin: Optional[dict] = None, **kwargs) -> None:
        if not isinstance(plugin, dict) or 'type' not in plugin:
            raise TypeError(
                "plugin must be a dict with a type, such as dict(type='ECA'), "
                f'got {plugin!r}'
            )
        super().__init__(channels, **kwargs)
        self.config = dict(plugin)
        with building('plugin', plugin):
            self.plugin = build_plugin_layer(self.config, in_channels=channels)[1]

    def attend(self, x: Tensor, memory: Optional[StageMemory] = None) -> Tensor:
        return self.plugin(x)

    def fingerprint(self) -> str:
        return f'Plugin({self.config["type"]})'


class SummedConv2d(nn.Module):
    """A convolution whose output gets a further summand before the next norm.

    It is not an ``nn.Conv2d``, so that tools do not fold the norm into it, which would
    be wrong. It has the keys of the convolution that it replaces.

    Args:
        conv (nn.Conv2d): The convolution, whose parameters are used.
        out_channels (int, optional): Use only this many output channels. Defaults to
            None, which means all.

    Raises:
        ValueError: If ``conv`` is not a plain 2-D convolution with zero padding.
    """

    def __init__(self, conv: nn.Module, out_channels: Optional[int] = None) -> None:
        super().__init__()
        if type(conv) is not nn.Conv2d or conv.padding_mode != 'zeros':
            raise ValueError(
                f'a plain nn.Conv2d with zero padding is needed here, got {conv}'
            )
        self.weight, self.bias = conv.weight, conv.bias
        if out_channels is not None:
            self.weight = nn.Parameter(conv.weight.detach()[:out_channels].clone())
            if conv.bias is not None:
                self.bias = nn.Parameter(conv.bias.detach()[:out_channels].clone())
        self.in_channels, self.out_channels = conv.in_channels, len(self.weight)
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        self.groups = conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H_in, W_in) to (B, C_out, H, W)."""
        return F.conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def extra_repr(self) -> str:
        return f'{self.in_channels}, {self.out_channels}, {self.kernel_size}'


def branch_end(block: nn.Module) -> str:
    """Find the submodule of a block whose output is the residual branch.

    Args:
        block (nn.Module): A block of the ResNet family or of EfficientNet.

    Returns:
        str: Name of the last normalization, or of the last convolution module that
        includes one.

    Raises:
        ValueError: If the block is of another kind.
    """
    for name in ('norm3', 'norm2', 'linear_conv', 'conv2'):
        if getattr(block, name, None) is not None:
            return name
    raise ValueError(
        f'{type(block).__name__} has no known residual branch; allowed are blocks of '
        'the ResNet family and of EfficientNet'
    )


def convolutions(block: nn.Module) -> Dict[str, Any]:
    """List the convolutions of a ResNet block.

    Args:
        block (nn.Module): The block.

    Returns:
        dict[str, nn.Module]: ``conv1``, ``conv2`` and ``conv3``, if they exist, in
        order.

    Raises:
        ValueError: If the block is of another kind.
    """
    convs = {
        name: getattr(block, name)
        for name in ('conv1', 'conv2', 'conv3')
        if hasattr(getattr(block, name, None), 'in_channels')
    }
    if not hasattr(block, 'norm1') or 'conv1' not in convs:
        raise ValueError(f'{type(block).__name__} is not a block of the ResNet family')
    return convs


def pooled(x: Tensor) -> Tensor:
    """Global average pooling, (B, C, H, W) to (B, C)."""
    return torch.flatten(x.mean((2, 3)), 1)
