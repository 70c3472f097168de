"""Base classes of the layer attentions: state, heads and initialization."""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..arguments import CheckedArguments, building, check_count, check_number
from ..ops import CompiledForward, is_compiling
from ..ops.normed_sum import relu_open_at_zero
from .state import AttentionState, decode, decode_text, encode, encode_text


@dataclass
class StageMemory:
    """The memory that the blocks of a stage share during one forward pass.

    A layer attention extends it in a nested class ``Memory``.

    Attributes:
        scores (list[Tensor]): Scaled scores before the softmax of each active
            attention so far, (B, G, t), where ``t`` is the number of tokens that it
            attends over, or (B, G, P, t) if each of P positions has its own weights;
            empty if the attentions do not weigh layers.
        first (LayerAttention, optional): The first attention of the stage, which
            holds the shared submodules. Defaults to None.
    """

    scores: List[Tensor] = field(default_factory=list)
    first: Optional['LayerAttention'] = None


class _LayerAttentionMeta(CheckedArguments):
    """Checks arguments before the constructor runs, and adds the signature after."""

    def __call__(cls, *args, **kwargs):
        attention = super().__call__(*args, **kwargs)
        attention.register_buffer('signature', encode_text(attention.fingerprint()))
        return attention


class LayerAttention(BaseModule, metaclass=_LayerAttentionMeta):
    """Layer attention of one residual block.

    A subclass implements the formula in :meth:`attend` and declares the memory of a
    stage as ``Memory``. The hooks of the block call :meth:`update`.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        drop_path (float): Probability of dropping the attention of a sample
            in training. Defaults to 0.
        init_cfg (dict | list[dict], optional): Initialization config. Defaults
            to None.

    Attributes:
        place (Place, optional): Its place in the network, see
            :class:`mmela.layers.stage.Place`. None if it is not attached.
        taps (dict[str, str]): The methods that :meth:`connect` returned.

    Raises:
        TypeError: If an argument is unknown or has the wrong type.
        ValueError: If ``channels`` is not a multiple of ``head_dim`` or
            ``drop_path`` is not in [0, 1).
    """

    Memory = StageMemory

    prunable = False
    """bool: Whether the attention computes a distribution over layers, which
    redundancy is measured on."""

    needs_identity = False
    """bool: Whether it needs the identity input of the block, as
    ``memory.identity``."""

    needs_map = True
    """bool: Whether it needs the height and width of maps. If False, it gets the tokens
    of a transformer, with class tokens, as a map (B, C, L, 1)."""

    backend = 'auto'
    """str: ``'compile'`` if ``torch.compile`` fuses the attention, see
    :class:`mmela.ops.CompiledForward`."""

    crosses_stages = False
    """bool: Whether the first attention of a stage starts from the memory of the
    previous stage, ``memory.before``."""

    shared: Tuple[str, ...] = ()
    """tuple[str]: Submodules that the attentions of a stage share. The first one
    holds them; the others are built with ``owns_shared=False`` and reach them as
    ``memory.first``."""

    used_by_value: Tuple[str, ...] = ()
    """tuple[str]: Submodules that the state ``VALUE_ONLY`` still uses."""

    random_start: Optional[Tensor] = None
    """Tensor | None: Initial weights of query and key."""

    scale: Optional[nn.Parameter]
    """nn.Parameter | None: Factor per channel, (C,), of the retrieved features."""

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        drop_path: float = 0.0,
        init_cfg: Union[dict, List[dict], None] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_count('channels', channels, 1)
        check_divides('head_dim', head_dim, channels)
        check_number('drop_path', drop_path, 0, 1, open_high=True)
        self.channels = channels
        self.head_dim = head_dim
        self.num_heads = channels // head_dim
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.register_parameter('scale', None)
        self.place: Any = None
        self.taps: Dict[str, str] = {}
        self.loaded = False  # whether a checkpoint was loaded
        self._compiled = CompiledForward()
        self._state = AttentionState.ACTIVE
        self._disabled: List[str] = []
        # The checkpoint stores the state as a buffer. The forward pass reads
        # `_state` instead, so it does not wait for the device.
        self.register_buffer('state', torch.tensor(encode(AttentionState.ACTIVE)))
        self._note_state()

    def __call__(self, x: Tensor, memory: Optional[StageMemory] = None) -> Tensor:
        if self.backend == 'compile' and memory is not None:
            return self._compiled(self, super().__call__, x, memory)
        return super().__call__(x, memory)

    def forward(self, x: Tensor, memory: Optional[StageMemory] = None) -> Tensor:
        """Extend the memory and attend over it.

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (StageMemory, optional): Memory of the stage, a ``Memory``.
                Defaults to None, which returns ``x``: a block that loops over its
                children also calls its attention.

        Returns:
            Tensor: The retrieved features, (B, C, H, W).
        """
        return x if memory is None else self.attend(x, memory)

    @abstractmethod
    def attend(self, x: Tensor, memory: Any) -> Tensor:
        """Extend the memory and attend over it.

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (StageMemory): Memory of the stage, a ``Memory``.

        Returns:
            Tensor: The retrieved features, (B, C, H, W). :meth:`update` adds them to
            ``x``, with stochastic depth.
        """

    def store(self, x: Tensor, memory: Any) -> Any:
        """Extend the memory without attending over it, in the state ``VALUE_ONLY``.

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (StageMemory): Memory of the stage, a ``Memory``.

        Raises:
            NotImplementedError: If the attention has no key and value.
        """
        raise NotImplementedError(
            f'{type(self).__name__} has no key and value to keep; prune it without '
            'keep_value'
        )

    def update(self, features: Tensor, memory: Any, args: tuple, output: Any) -> Tensor:
        """Update the features of a block according to the pruning state.

        Args:
            features (Tensor): Features that the block returned, in its layout.
            memory (StageMemory): Memory of the stage, a ``Memory``.
            args (tuple): Arguments of the block.
            output (Any): The whole output of the block.

        Returns:
            Tensor: Features of the same shape; the same object if the attention is
            not active.
        """
        state = self.attention_state
        if state == AttentionState.PRUNED:
            return features
        x = features
        if state == AttentionState.VALUE_ONLY:
            # The network may write into `features` later; the memory must not change.
            x = features.clone()
        layout = self.place.features
        if layout.layout != 'BCHW' and hasattr(self, 'pre_norm'):
            x = self.pre_norm(x)
        if self.needs_map:
            x, restore = layout.to_map(x, args, output)
        else:
            x, restore = layout.to_positions(x)
        if state == AttentionState.VALUE_ONLY:
            self.store(x, memory)
            return features
        retrieved = restore(self(x, memory))
        if self.scale is not None:
            # Not in `attend`, because class tokens are scaled too
            scale = self.scale.to(retrieved.dtype)
            on_maps = layout.layout == 'BCHW'
            retrieved = retrieved * (scale[:, None, None] if on_maps else scale)
        return self.combine(features, retrieved)

    def combine(self, features: Tensor, retrieved: Tensor) -> Tensor:
        """Add the retrieved features to those of the block.

        Args:
            features (Tensor): Features of the block.
            retrieved (Tensor): Features that its attention retrieved, of the same
                shape.

        Returns:
            Tensor: Features of the same shape.
        """
        return features + self.drop_path(retrieved)

    @classmethod
    def is_branch(cls, arguments: dict) -> bool:
        """Whether it adds a branch to its block, which stochastic depth may drop.

        Args:
            arguments (dict): Arguments of the constructor.

        Returns:
            bool: If True, it has the stochastic depth of its block by default. If
            False, the retrieved features replace the block's output.
        """
        return True

    def opens_token(self, before: Optional['LayerAttention']) -> bool:
        """Whether its block starts a new token for the attentions of the stage.

        Args:
            before (LayerAttention, optional): The previous attention that is not
                pruned; None for the first.

        Returns:
            bool: False if its block adds to the token of ``before``.
        """
        return True

    def connect(self, block: nn.Module) -> Tuple[Dict[str, str], Dict[str, nn.Module]]:
        """Declare the submodules of the block that the attention reads or replaces.

        Args:
            block (nn.Module): The block, which this method must not change.

        Returns:
            tuple[dict[str, str], dict[str, nn.Module]]: Names of submodules of the
            block, mapped to the method that sees their output, see
            :class:`mmela.layers.stage.Tap`; and replacements of submodules by name.
        """
        return {}, {}

    def reset_parameters(self) -> None:
        """Set all weights to their start; those of submodules may do so themselves."""

    def init_weights(self) -> None:
        """Initialize the weights, replacing those that a parent has set."""
        if self.init_cfg:
            super().init_weights()
            return
        for child in self.children():
            if hasattr(child, 'init_weights'):
                child.init_weights()
        self.reset_parameters()
        self._is_init = True

    # -- pruning state --------------------------------------------------------

    @property
    def active(self) -> bool:
        """bool: Whether nothing of the attention is pruned."""
        return self.attention_state == AttentionState.ACTIVE

    @property
    def reached(self) -> bool:
        """bool: Whether it has run; True if it is not attached."""
        return self.place is None or self.place.stage.reached[self.place.index]

    def movement(self) -> Optional[float]:
        """Distance of query and key from their random start.

        Returns:
            float | None: Norm of the change, relative to the norm of the initial
            weights; None for an attention without query and key.
        """
        return None

    @property
    def attention_state(self) -> AttentionState:
        """AttentionState: The pruning state."""
        if not is_compiling() and self._state_changed():
            # An averaged copy, a loader or another network wrote the buffer
            try:
                self._state = decode(self.state)[0]
            except ValueError as error:
                where = self.place.block if self.place else type(self).__name__
                raise ValueError(f'layer attention of {where}: {error}') from error
            self._note_state()
        return self._state

    @attention_state.setter
    def attention_state(self, state: AttentionState) -> None:
        self._state = AttentionState(state)
        self.state.fill_(encode(self._state))
        self._note_state()
        self._sync_requires_grad()

    def train(self, mode: bool = True) -> 'LayerAttention':
        """Set the mode and read the state buffer again.

        Weight averaging may write the buffer without changing its version, and
        sets the mode before it evaluates.
        """
        super().train(mode)
        self._seen: Tuple[Any, Any] = (None, None)
        return self

    def _note_state(self) -> None:
        version = None if self.state.is_inference() else self.state._version
        self._seen = self.state, version

    def _state_changed(self) -> bool:
        """Whether the buffer was written to, without waiting for the device."""
        seen, version = self._seen
        if torch._C._functorch.is_functorch_wrapped_tensor(self.state):
            return False  # under vmap it is not a single value
        if self.state is not seen:
            # Replicas keep the state of the network that they were copied from.
            return not (self.state.is_meta or getattr(self, '_is_replica', False))
        if self.training and torch.is_grad_enabled():
            return False  # distributed training writes the buffer in every pass
        return not self.state.is_inference() and self.state._version != version

    def _sync_requires_grad(self) -> None:
        """Disable gradients of parameters that the state leaves unused.

        It enables only what it disabled before, so a frozen stage stays frozen.
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

    def fingerprint(self) -> str:
        """Text that distinguishes attentions whose parameters look the same.

        Returns:
            str: Class and arguments. A checkpoint stores it as ``signature`` and does
            not load into an attention with a different one.
        """
        return f'{type(self).__name__}(head_dim={self.head_dim})'

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self.loaded = True
            self._check_signature(state_dict, prefix)
            self._load_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_signature(self, state_dict: dict, prefix: str) -> None:
        saved = state_dict.get(prefix + 'signature')
        # Checkpoints of mmela 0.1 have none.
        if saved is not None and not saved.is_meta:
            text = decode_text(saved)
            if text != self.fingerprint():
                raise RuntimeError(
                    f'the checkpoint has {text!r} at {prefix[:-1]}, but the '
                    f'network has {self.fingerprint()!r} there; build the network '
                    'with the config of the checkpoint'
                )
        state_dict[prefix + 'signature'] = self.signature.detach().clone()

    def _load_state(self, state_dict: dict, prefix: str) -> None:
        key = prefix + 'state'
        if key not in state_dict:
            raise RuntimeError(
                f'the checkpoint has weights of {prefix[:-1]} but no {key}, so its '
                'pruning state is unknown; save buffers as well as parameters'
            )
        if state_dict[key].is_meta:
            return
        try:
            state, exact = decode(state_dict[key])
        except ValueError as error:
            raise RuntimeError(f'{key}: {error}') from error
        if not exact:
            print_log(
                f'{key} is {float(state_dict[key]):g}, an average of networks with '
                f'different pruning states. It is read as {state.name}.',
                'current',
                level=30,
            )
        self.attention_state = state
        state_dict[key] = self.state.detach().clone()

    def extra_repr(self) -> str:
        return f'channels={self.channels}, {self.fingerprint()}, {self._state.name}'


class QKVLayerAttention(LayerAttention):
    """Base class of layer attentions with the transforms of MRLA (section 4.1).

    Query and key are 1-D convolutions over the channels of the pooled block output
    ``X^t``; the value is a depth-wise 3x3 convolution of ``X^t``. A subclass combines
    them in :meth:`attend`.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head; 32 for ImageNet and COCO
            ResNets, 16 for transformers, 8 for EfficientNet (MRLA, section
            5.1), 16 on CIFAR (KCLA, section V-A). Defaults to 32.
        drop_path (float): Probability of dropping the attention of a sample
            in training. Defaults to 0.
        norm_cfg (dict, optional): Normalization of the retrieved features; None
            for none. Defaults to ``dict(type='BN')``.
        value_act_cfg (dict, optional): Activation of the value; None for none.
            Defaults to None.
        zero_init (bool): Start with a normalization weight of 0, so that the block
            first computes what the plain residual block does. Use it for networks
            that start from the weights of a plain one. Without a normalization, a
            learnable scale per channel starts at 0 instead. Defaults to False.
        token_norm_cfg (dict, optional): Normalization of the tokens of a
            transformer before attention, which their stage asks for (MRLA,
            algorithms 2 and 4). Defaults to None.
        small_init (float, optional): Initial normalization weight, or initial scale
            without a normalization, such as 0.2. It is also for networks that start
            from the weights of a plain one. Their output first differs slightly from
            that of the plain network, but the attention contributes and learns from
            the first iteration on; with ``zero_init`` it hardly grows. If the
            backbone evaluates its norms (``norm_eval=True``), use a norm without
            running statistics, such as ``norm_cfg=dict(type='GN', num_groups=32)``.
            Defaults to None, which means 1.
        init_cfg (dict | list[dict], optional): Initialization config. Defaults to
            None.
        value_conv (bool): Whether the value is a convolution of the output; if
            False, it is the output itself (MRLA, table 4, c). Defaults to True.
        fc_reduction (int, optional): Make query and key linear maps that reduce the
            channels by this factor (MRLA, table 4, d; 16 gives the same number of
            parameters as there). Defaults to None, which means 1-D convolutions.

    Raises:
        ValueError: As in :class:`LayerAttention`; also if both ``zero_init`` and
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
        init_cfg: Union[dict, List[dict], None] = None,
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
                    f'small_init={small_init} and zero_init=True set different '
                    'initial weights; set only one of them'
                )
            check_number('small_init', small_init, 0, 1, open_low=True)
        self.zero_init = zero_init
        self.small_init = small_init
        # Registered before the value, because tools fold a norm into the convolution
        # registered before it.
        with building('norm_cfg', norm_cfg):
            self.norm = build_norm_layer(norm_cfg, channels)[1] if norm_cfg else None
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
        self.value_act: nn.Module = nn.Identity()
        if value_act_cfg:
            with building('value_act_cfg', value_act_cfg):
                self.value_act = build_activation_layer(value_act_cfg)
        # Class tokens bypass the norm, so they need the scale.
        if self.from_plain and (norm_cfg is None or token_norm_cfg):
            self.scale = nn.Parameter(torch.zeros(channels))
        if token_norm_cfg:
            with building('token_norm_cfg', token_norm_cfg):
                self.pre_norm = build_norm_layer(token_norm_cfg, channels)[1]
        self.reset_parameters()

    relu = True
    """bool: Whether :meth:`norm_relu` applies a ReLU after the normalization."""

    @property
    def from_plain(self) -> bool:
        """bool: Whether it is set up for a network that starts from plain weights."""
        return self.zero_init or self.small_init is not None

    def reset_parameters(self) -> None:
        """Draw new weights."""
        if hasattr(self, 'query'):
            self.query.reset_parameters()
            self.key.reset_parameters()
            self.random_start = self._query_and_key()
        # The published code takes Kaiming's fan-out without the groups, and the norm
        # corrects the scale. In a pre-trained detector the norm often runs in eval
        # mode with its initial statistics and corrects nothing, and without a norm
        # nothing does: there, use the true fan of a depth-wise convolution.
        published = self.norm is not None and not self.from_plain
        fan_out = 9 * self.channels if published else 9
        if isinstance(self.value, nn.Conv2d):
            nn.init.normal_(self.value.weight, std=math.sqrt(2 / fan_out))
        weight = 0.0 if self.zero_init else self.small_init or 1.0
        if self.scale is not None:
            nn.init.constant_(self.scale, weight)
            weight = 1.0
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, weight)
            nn.init.constant_(self.norm.bias, 0.0)
        if hasattr(self, 'pre_norm'):
            self.pre_norm.reset_parameters()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        has_norm = f'{prefix}norm.weight' in state_dict
        if self.scale is not None and self.norm is not None and has_norm:
            # Versions before 0.2 had either a norm or a scale.
            state_dict.setdefault(f'{prefix}scale', torch.ones_like(self.scale))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _query_and_key(self) -> Tensor:
        """Weights of query and key, (2 k,), on the CPU."""
        weights = [self.query.weight, self.key.weight]
        flat = torch.cat([w.detach().flatten() for w in weights]).float()
        return flat if flat.is_meta else flat.cpu()

    def movement(self) -> Optional[float]:
        if not hasattr(self, 'query'):
            return None
        change = self._query_and_key() - self.random_start
        return float(change.norm() / self.random_start.norm())

    def heads(self, y: Tensor) -> Tensor:
        """Split query or key into heads.

        Args:
            y (Tensor): Query or key of a block, (B, 1, C).

        Returns:
            Tensor: (B, G, d), in at least single precision. ``fc_reduction`` divides
            ``d`` and ``C``.
        """
        y = y.view(-1, self.num_heads, y.shape[-1] // self.num_heads)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def per_channel(self, weight: Tensor, x: Tensor) -> Tensor:
        """Expand weights of heads to channels.

        Args:
            weight (Tensor): A weight for each head, (B, G).
            x (Tensor): A tensor of the wanted dtype.

        Returns:
            Tensor: (B, C, 1, 1).
        """
        weight = weight.repeat_interleave(self.head_dim, dim=1)
        return weight[..., None, None].to(x.dtype)

    def norm_relu(self, out: Tensor) -> Tensor:
        """ReLU(norm(out)), (B, C, H, W); ``out`` itself without a norm."""
        if self.norm is None:
            return out
        out = self.norm(out)
        if not self.relu:
            return out
        if not self.training:
            return F.relu(out)
        return relu_open_at_zero(out)


def check_divides(name: str, value: int, channels: int) -> None:
    """Check an argument that splits the channels of a block.

    Args:
        name (str): Name of the argument.
        value (int): Its value.
        channels (int): Channels of the block.

    Raises:
        ValueError: If it does not divide them; the message lists what does.
    """
    if value < 1 or channels % value:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise ValueError(
            f'{name}={value} does not divide the {channels} channels of the block; '
            f'allowed are {divisors}'
        )


def pool(x: Tensor) -> Tensor:
    """Global average pooling, (B, C, H, W) to (B, 1, C)."""
    if x.dtype == torch.float16:  # a sum may overflow
        return x.mean((2, 3)).unsqueeze(1)
    # The gradient of a sum needs no memory; that of a mean needs as much as `x`.
    return (x.sum((2, 3)) / (x.shape[2] * x.shape[3])).unsqueeze(1)


def channel_conv(channels: int) -> nn.Conv1d:
    """Build the 1-D convolution over channels for queries or keys.

    Args:
        channels (int): Number of channels, which sets the kernel size.

    Returns:
        nn.Conv1d: From (B, 1, C) to (B, 1, C).
    """
    size = eca_kernel_size(channels)
    return nn.Conv1d(1, 1, size, padding=size // 2, bias=False)


def eca_kernel_size(channels: int) -> int:
    """Kernel size of a 1-D convolution over channels.

    MRLA uses this rule of ECA-Net (eq. 12, gamma 2, b 1) for its query and key
    (section 4.1).

    Args:
        channels (int): Number of channels.

    Returns:
        int: An odd kernel size.
    """
    size = int(abs(math.log2(channels) + 1) / 2)
    return size if size % 2 else size + 1
