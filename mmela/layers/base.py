"""What all layer attentions share: their state, heads and initialization."""

import math
from abc import ABCMeta, abstractmethod
from dataclasses import dataclass, field
from enum import IntEnum
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import is_compiling
from ..ops.normed_sum import relu_open_at_zero


class AttentionState(IntEnum):
    """What is left of a layer attention.

    The value is what a checkpoint holds under ``layer_attn.state``.
    """

    ACTIVE = 0
    """Nothing is pruned."""
    VALUE_ONLY = 1
    """Retrieves nothing, but later layers still see its key and value."""
    PRUNED = 2
    """Removed whole: its block is a plain residual block."""


@dataclass
class StageMemory:
    """What the blocks of one stage share during one forward pass.

    A layer attention adds what it needs in a ``Memory`` of its own.

    Attributes:
        scores (list[Tensor]): Scaled scores before the softmax of each active
            attention so far, (B, G, t) with ``t`` the number of tokens that it
            attends over; empty where attentions weigh no layers.
    """

    scores: List[Tensor] = field(default_factory=list)


class LayerAttention(BaseModule, metaclass=ABCMeta):
    """Layer attention of one residual block.

    A subclass has the formula in :meth:`forward` and beside it, as ``Memory``,
    what the blocks of a stage share for it. Its stage adds the result to the
    output of the block and sees to what is pruned.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        drop_path (float): Probability of dropping the attention of a sample
            in training. Defaults to 0.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: If ``channels`` is no multiple of ``head_dim`` or
            ``drop_path`` is not in [0, 1).
    """

    Memory = StageMemory

    prunable = False
    """bool: Whether the attention yields a distribution over layers, which is
    what redundancy is measured on."""

    takes_block = False
    """bool: Whether the constructor takes the index of the block in its
    stage, as ``block``."""

    needs_identity = False
    """bool: Whether the stage shall hand over the identity input of the
    block, as ``memory.identity``."""

    crosses_stages = False
    """bool: Whether the first attention of a stage takes over the memory of
    the stage before, as ``memory.before``. Its constructor then takes
    ``previous_channels`` and ``stride``."""

    replaces = False
    """bool: Whether what is retrieved takes the place of the block's output
    instead of being added to it."""

    before_sum = False
    """bool: Whether it works within the block instead of after it, see
    :meth:`connect`; the stage then adds nothing to the block's output."""

    needs_memory = True
    """bool: Whether it has any use for the memory, if it is ``before_sum``."""

    shared: Tuple[str, ...] = ()
    """tuple[str]: Submodules that the attentions of a stage have in common and
    the first of them holds. The constructor of the others takes that one as
    ``first``."""

    random_start: Optional[Tensor] = None
    """Tensor | None: Weights of query and key as they were drawn."""

    used_by_value: Tuple[str, ...] = ()
    """tuple[str]: Submodules that ``VALUE_ONLY`` still uses."""

    scale: Optional[nn.Parameter]
    """nn.Parameter: Factor per channel, (C,), which the stage applies to what
    is retrieved; None for none."""

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        drop_path: float = 0.0,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        if head_dim < 1 or channels % head_dim:
            divisors = [d for d in range(1, channels + 1) if channels % d == 0]
            raise ValueError(
                f'head_dim={head_dim} does not divide the {channels} channels '
                f'of a block; allowed are {divisors}'
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f'drop_path={drop_path} is not a probability in [0, 1)')
        self.channels = channels
        self.head_dim = head_dim
        self.num_heads = channels // head_dim
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.register_parameter('scale', None)
        self._state = AttentionState.ACTIVE
        self._disabled: List[str] = []
        # The state travels in the checkpoint as a buffer; the forward pass
        # reads `_state`, so that it never waits for the device.
        self.register_buffer('state', torch.tensor(0, dtype=torch.uint8))
        self._seen = self._state_version()

    @classmethod
    def would_need_identity(cls, arguments: dict) -> bool:
        """Whether an attention with these arguments has ``needs_identity``.

        Args:
            arguments (dict): Arguments of the constructor.

        Returns:
            bool: True if it has. To be overridden where they decide.
        """
        return cls.needs_identity

    @abstractmethod
    def forward(self, x: Tensor, memory: StageMemory) -> Tensor:
        """Extend the memory and attend over it.

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (StageMemory): Memory of the stage, a ``Memory``.

        Returns:
            Tensor: What the block retrieves, (B, C, H, W). Its stage adds that
            to ``x``, with stochastic depth.
        """

    def store(self, x: Tensor, memory: StageMemory) -> None:
        """Extend the memory without attending over it (``VALUE_ONLY``).

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (StageMemory): Memory of the stage, a ``Memory``.

        Raises:
            NotImplementedError: If the attention has no key and value.
        """
        raise NotImplementedError(f'{type(self).__name__} has no key and value to keep')

    def connect(self, block: nn.Module) -> List[Tuple[nn.Module, str]]:
        """Meet the block, for attentions that reach into it.

        Args:
            block (nn.Module): The block.

        Returns:
            list[tuple[nn.Module, str]]: Submodules of the block, each with the
            name of a method that takes the submodule's input, its output and
            the memory, and returns what takes the place of the output.
        """
        return []

    # -- what is left of it --------------------------------------------------

    @property
    def active(self) -> bool:
        """bool: Whether the attention is computed."""
        return self.attention_state == AttentionState.ACTIVE

    def movement(self) -> Optional[float]:
        """How far query and key have come from their random start.

        Returns:
            float | None: Norm of the change relative to that of the start;
            None for an attention without query and key.
        """
        return None

    @property
    def attention_state(self) -> AttentionState:
        """AttentionState: What is left of the attention."""
        if not self.training and not is_compiling():
            if self._state_version() != self._seen:
                # Somebody wrote to the buffer: an averaged copy of the network
                self.attention_state = AttentionState(int(self.state))
        return self._state

    @attention_state.setter
    def attention_state(self, state: AttentionState) -> None:
        self._state = AttentionState(state)
        self.state.fill_(int(self._state))
        self._seen = self._state_version()
        self._sync_requires_grad()

    def _state_version(self) -> int:
        """Changes whenever the buffer is written to; costs no synchronization."""
        return 0 if self.state.is_inference() else self.state._version

    def _sync_requires_grad(self) -> None:
        """Take the parameters that the state leaves unused out of training.

        Only what was disabled here is enabled again, so that a frozen stage
        stays frozen.
        """
        for name, param in self.named_parameters():
            part = name.split('.')[0]
            used = (
                self._state == AttentionState.ACTIVE
                or (
                    self._state == AttentionState.VALUE_ONLY
                    and part in self.used_by_value
                )
                or part in self.shared
            )
            if not used and param.requires_grad:
                param.requires_grad_(False)
                param.grad = None
                self._disabled.append(name)
            elif used and name in self._disabled:
                param.requires_grad_(True)
                self._disabled.remove(name)

    # -- checkpoints ---------------------------------------------------------

    def signature(self) -> str:
        """What tells attentions apart whose parameters look the same.

        Returns:
            str: Class and arguments; a checkpoint holds it beside the
            parameters and does not load into an attention with another.
        """
        return f'{type(self).__name__}(head_dim={self.head_dim})'

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A tensor, as files for tensors alone (safetensors) hold it too
        destination[prefix + 'signature'] = torch.tensor(
            list(self.signature().encode()), dtype=torch.uint8
        )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        saved = state_dict.pop(prefix + 'signature', None)
        if saved is not None:  # checkpoints of mmela 0.1 have none
            text = bytes(saved.tolist()).decode(errors='replace')
            if text != self.signature():
                raise RuntimeError(
                    f'the checkpoint holds {text!r} at {prefix[:-1]}, but the '
                    f'network has {self.signature()!r} there'
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + 'state' in state_dict:
            self.attention_state = AttentionState(int(self.state))

    def extra_repr(self) -> str:
        return f'channels={self.channels}, {self.signature()}, {self._state.name}'


class QKVLayerAttention(LayerAttention):
    """A layer attention with the transforms of MRLA (section 4.1).

    Query and key are 1-D convolutions over the channels of the pooled block
    output ``X^t``, the value is a depth-wise 3x3 convolution of ``X^t``. A
    subclass says in :meth:`forward` how they are put together.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head; 32 for ImageNet and COCO
            ResNets, 16 for transformers, 8 for EfficientNet (MRLA, section
            5.1), 16 on CIFAR (KCLA, section V-A). Defaults to 32.
        drop_path (float): Probability of dropping the attention of a sample
            in training. Defaults to 0.
        norm_cfg (dict, optional): Normalization of what is retrieved; None
            for none. Defaults to ``dict(type='BN')``.
        value_act_cfg (dict, optional): Activation of the value. Defaults to
            None, which means none.
        zero_init (bool): Start with a normalization weight of 0, so that the
            block's output is at first that of the plain residual block. For
            networks that start from the weights of a plain one. Without a
            normalization, a learnable scale per channel starts at 0 instead.
            Defaults to False.
        token_norm_cfg (dict, optional): Normalization of the tokens of a
            transformer before they are attended over, which their stage asks
            for (MRLA, algorithms 2 and 4). Defaults to None.
        small_init (float, optional): Start with this normalization weight, or
            scale without a normalization, such as 0.2. For networks that start from the
            weights of a plain one, too: their output is at first not quite that
            of the plain one, but the attention takes part from the first
            iteration on, and learns, where with ``zero_init`` it hardly ever
            grows. Where the
            backbone evaluates its norms (``norm_eval=True``), give one that
            normalizes then, such as
            ``norm_cfg=dict(type='GN', num_groups=32)``. Defaults to None,
            which means 1.
        init_cfg (dict, optional): Initialization config. Defaults to None.
        value_conv (bool): Whether the value is a convolution of the output;
            without, it is the output itself (MRLA, table 4, c). Defaults to
            True.
        fc_reduction (int, optional): Query and key are linear maps to so many
            times fewer channels (MRLA, table 4, d, which 16 has the parameters
            of). Defaults to None, which means 1-D convolutions.

    Raises:
        ValueError: As :class:`LayerAttention` does, if both ``zero_init`` and
            ``small_init`` are set, if ``small_init`` is not in (0, 1], or if
            ``fc_reduction`` does not divide ``head_dim``.
    """

    random_start: Tensor

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        drop_path: float = 0.0,
        norm_cfg: Optional[dict] = dict(type='BN'),  # noqa: B006
        value_act_cfg: Optional[dict] = None,
        zero_init: bool = False,
        token_norm_cfg: Optional[dict] = None,
        small_init: Optional[float] = None,
        init_cfg: Optional[dict] = None,
        value_conv: bool = True,
        fc_reduction: Optional[int] = None,
    ) -> None:
        super().__init__(channels, head_dim, drop_path, init_cfg)
        if fc_reduction is not None and (fc_reduction < 1 or head_dim % fc_reduction):
            raise ValueError(
                f'fc_reduction={fc_reduction} does not divide head_dim={head_dim}'
            )
        if small_init is not None:
            if zero_init:
                raise ValueError(
                    f'small_init={small_init} starts with another normalization '
                    'weight than zero_init=True; set one of them'
                )
            if not 0 < small_init <= 1:
                raise ValueError(f'small_init={small_init} is not in (0, 1]')
        self.zero_init = zero_init
        self.small_init = small_init
        if fc_reduction is None:
            self.query: Union[nn.Conv1d, nn.Linear] = channel_conv(channels)
            self.key: Union[nn.Conv1d, nn.Linear] = channel_conv(channels)
        else:
            width = channels // fc_reduction
            self.query = nn.Linear(channels, width, bias=False)
            self.key = nn.Linear(channels, width, bias=False)
        self.value: nn.Module = nn.Identity()
        if value_conv:
            self.value = nn.Conv2d(
                channels, channels, 3, padding=1, groups=channels, bias=False
            )
        self.value_act = (
            build_activation_layer(value_act_cfg) if value_act_cfg else nn.Identity()
        )
        self.norm = build_norm_layer(norm_cfg, channels)[1] if norm_cfg else None
        if self.from_plain and norm_cfg is None:
            self.scale = nn.Parameter(torch.zeros(channels))
        if token_norm_cfg:
            self.pre_norm = build_norm_layer(token_norm_cfg, channels)[1]
        self.reset_parameters()

    relu = True
    """bool: Whether :meth:`norm_relu` has a ReLU after the normalization."""

    @property
    def from_plain(self) -> bool:
        """bool: Whether it is for a network that starts from plain weights."""
        return self.zero_init or self.small_init is not None

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        if hasattr(self, 'query'):
            self.query.reset_parameters()
            self.key.reset_parameters()
            self.random_start = self._query_and_key()
        # Published: Kaiming over the fan-out without regard to the groups; the
        # norm corrects the scale. In a pre-trained detector the norm is often
        # evaluated with its initial statistics and corrects nothing, so there
        # the true fan of a depth-wise convolution counts. So it does where
        # there is no norm.
        published = self.norm is not None and not self.from_plain
        fan_out = 9 * self.channels if published else 9
        if isinstance(self.value, nn.Conv2d):
            nn.init.normal_(self.value.weight, std=math.sqrt(2 / fan_out))
        weight = 0.0 if self.zero_init else self.small_init or 1.0
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, weight)
            nn.init.constant_(self.norm.bias, 0.0)
        if self.scale is not None:
            nn.init.constant_(self.scale, weight)

    def init_weights(self) -> None:
        """Initialize the weights, after those that a parent set by type."""
        if self.init_cfg:
            super().init_weights()
        else:
            self.reset_parameters()
            self._is_init = True

    def _query_and_key(self) -> Tensor:
        """Weights of query and key, (2 k,), on the CPU."""
        weights = [self.query.weight, self.key.weight]
        return torch.cat([w.detach().flatten() for w in weights]).float().cpu()

    def movement(self) -> Optional[float]:
        if not hasattr(self, 'query'):
            return None
        change = self._query_and_key() - self.random_start
        return float(change.norm() / self.random_start.norm())

    def heads(self, y: Tensor) -> Tensor:
        """Cut query or key into heads.

        Args:
            y (Tensor): Query or key of a block, (B, 1, C).

        Returns:
            Tensor: (B, G, d), in at least single precision. With
            ``fc_reduction``, ``d`` and ``C`` are so many times fewer.
        """
        y = y.view(-1, self.num_heads, y.shape[-1] // self.num_heads)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def per_channel(self, weight: Tensor, x: Tensor) -> Tensor:
        """Give each channel the weight of its head.

        Args:
            weight (Tensor): A weight for each head, (B, G).
            x (Tensor): A tensor of the dtype that is wanted.

        Returns:
            Tensor: (B, C, 1, 1).
        """
        weight = weight.repeat_interleave(self.head_dim, dim=1)
        return weight[..., None, None].to(x.dtype)

    def norm_relu(self, out: Tensor) -> Tensor:
        """ReLU(norm(out)), (B, C, H, W); ``out`` where there is no norm."""
        if self.norm is None:
            return out
        out = self.norm(out)
        if not self.relu:
            return out
        if not self.training:
            return F.relu(out)
        return relu_open_at_zero(out)


def pool(x: Tensor) -> Tensor:
    """Global average pooling, (B, C, H, W) to (B, 1, C)."""
    if x.dtype == torch.float16:  # where a sum may be too large
        return x.mean((2, 3)).unsqueeze(1)
    # The gradient of a sum takes no memory, that of a mean as much as `x`
    return (x.sum((2, 3)) / (x.shape[2] * x.shape[3])).unsqueeze(1)


def channel_conv(channels: int) -> nn.Conv1d:
    """1-D convolution over the channel axis, for queries and keys.

    Args:
        channels (int): Number of channels, which decides the kernel size.

    Returns:
        nn.Conv1d: From (B, 1, C) to (B, 1, C).
    """
    size = eca_kernel_size(channels)
    return nn.Conv1d(1, 1, size, padding=size // 2, bias=False)


def eca_kernel_size(channels: int) -> int:
    """Kernel size of a 1-D convolution over the channel axis.

    The rule of ECA-Net (eq. 12, gamma 2, b 1), which MRLA uses for its query
    and key (section 4.1).

    Args:
        channels (int): Number of channels.

    Returns:
        int: An odd kernel size.
    """
    size = int(abs(math.log2(channels) + 1) / 2)
    return size if size % 2 else size + 1
