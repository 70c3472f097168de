"""What all layer attentions share: their state, heads and initialization."""

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
    """What the blocks of one stage share during one forward pass.

    A layer attention adds what it needs in a ``Memory`` of its own.

    Attributes:
        scores (list[Tensor]): Scaled scores before the softmax of each active
            attention so far, (B, G, t) with ``t`` the number of tokens that it
            attends over, or (B, G, P, t) where each of P positions has weights of
            its own; empty where attentions weigh no layers.
        first (LayerAttention, optional): The first attention of the stage, which
            holds what the attentions of a stage share. Defaults to None.
    """

    scores: List[Tensor] = field(default_factory=list)
    first: Optional['LayerAttention'] = None


class _LayerAttentionMeta(CheckedArguments):
    """Checks arguments before a constructor runs, and signs what it has made."""

    def __call__(cls, *args, **kwargs):
        attention = super().__call__(*args, **kwargs)
        attention.register_buffer('signature', encode_text(attention.fingerprint()))
        return attention


class LayerAttention(BaseModule, metaclass=_LayerAttentionMeta):
    """Layer attention of one residual block.

    A subclass has the formula in :meth:`attend` and beside it, as ``Memory``,
    what the blocks of a stage share for it. The hooks of its block call
    :meth:`update`.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        drop_path (float): Probability of dropping the attention of a sample
            in training. Defaults to 0.
        init_cfg (dict | list[dict], optional): Initialization config. Defaults
            to None.

    Attributes:
        place (Place, optional): Where it is in its network, see
            :class:`mmela.layers.stage.Place`. None outside of one.
        taps (dict[str, str]): What :meth:`connect` returned.

    Raises:
        TypeError: If an argument is unknown or of another type.
        ValueError: If ``channels`` is no multiple of ``head_dim`` or
            ``drop_path`` is not in [0, 1).
    """

    Memory = StageMemory

    prunable = False
    """bool: Whether the attention yields a distribution over layers, which is
    what redundancy is measured on."""

    needs_identity = False
    """bool: Whether it needs the identity input of the block, as
    ``memory.identity``."""

    needs_map = True
    """bool: Whether it needs height and width of maps. Without, tokens of a
    transformer come as a map (B, C, L, 1), class tokens among them."""

    backend = 'auto'
    """str: ``'compile'`` for an attention that ``torch.compile`` fuses, see
    :class:`mmela.ops.CompiledForward`."""

    crosses_stages = False
    """bool: Whether the first attention of a stage takes over the memory of
    the stage before, as ``memory.before``."""

    shared: Tuple[str, ...] = ()
    """tuple[str]: Submodules that the attentions of a stage have in common and
    the first of them holds, which is ``memory.first`` for the others. Those are
    made with ``owns_shared=False``."""

    used_by_value: Tuple[str, ...] = ()
    """tuple[str]: Submodules that ``VALUE_ONLY`` still uses."""

    random_start: Optional[Tensor] = None
    """Tensor | None: Weights of query and key as they were drawn."""

    scale: Optional[nn.Parameter]
    """nn.Parameter: Factor per channel, (C,), of what is retrieved; None for
    none."""

    def __init__(
        self,
        channels: int,
        head_dim: int = 32,
        drop_path: float = 0.0,
        init_cfg: Union[dict, List[dict], None] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_count('channels', channels, 1)
        if head_dim < 1 or channels % head_dim:
            divisors = [d for d in range(1, channels + 1) if channels % d == 0]
            raise ValueError(
                f'head_dim={head_dim} does not divide the {channels} channels '
                f'of a block; allowed are {divisors}'
            )
        check_number('drop_path', drop_path, 0, 1, open_high=True)
        self.channels = channels
        self.head_dim = head_dim
        self.num_heads = channels // head_dim
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.register_parameter('scale', None)
        self.place: Any = None
        self.taps: Dict[str, str] = {}
        self.loaded = False  # from a checkpoint
        self._compiled = CompiledForward()
        self._state = AttentionState.ACTIVE
        self._disabled: List[str] = []
        # The state travels in the checkpoint as a buffer; the forward pass
        # reads `_state`, so that it does not wait for the device.
        self.register_buffer('state', torch.tensor(encode(AttentionState.ACTIVE)))
        self._note_state()

    def __call__(self, x: Tensor, memory: Optional[StageMemory] = None) -> Tensor:
        if self.backend == 'compile' and memory is not None:
            return self._compiled(self, super().__call__, x, memory)
        return super().__call__(x, memory)

    def forward(self, x: Tensor, memory: Optional[StageMemory] = None) -> Tensor:
        """Extend the memory and attend over it.

        Without a memory ``x`` is returned: a block that loops over its children
        runs its attention as one of them.

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (StageMemory, optional): Memory of the stage, a ``Memory``.
                Defaults to None.

        Returns:
            Tensor: What the block retrieves, (B, C, H, W).
        """
        return x if memory is None else self.attend(x, memory)

    @abstractmethod
    def attend(self, x: Tensor, memory: Any) -> Tensor:
        """Extend the memory and attend over it.

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (StageMemory): Memory of the stage, a ``Memory``.

        Returns:
            Tensor: What the block retrieves, (B, C, H, W); :meth:`update` adds
            that to ``x``, with stochastic depth.
        """

    def store(self, x: Tensor, memory: Any) -> Any:
        """Extend the memory without attending over it (``VALUE_ONLY``).

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (StageMemory): Memory of the stage, a ``Memory``.

        Raises:
            NotImplementedError: If the attention has no key and value.
        """
        raise NotImplementedError(f'{type(self).__name__} has no key and value to keep')

    def update(self, features: Tensor, memory: Any, args: tuple, output: Any) -> Tensor:
        """What a block passes on, after its attention as far as that is left.

        Args:
            features (Tensor): Features that the block returned, in its layout.
            memory (StageMemory): Memory of the stage, a ``Memory``.
            args (tuple): Arguments of the block.
            output (Any): All that the block returned.

        Returns:
            Tensor: Features of the same shape; the same object where nothing is
            done.
        """
        state = self.attention_state
        if state == AttentionState.PRUNED:
            return features
        x = features
        if state == AttentionState.VALUE_ONLY:
            # The network has `features` and may write into it; the memory must not
            # change with it.
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
            # Here and not in `attend`, as it counts for class tokens too
            scale = self.scale.to(retrieved.dtype)
            on_maps = layout.layout == 'BCHW'
            retrieved = retrieved * (scale[:, None, None] if on_maps else scale)
        return self.combine(features, retrieved)

    def combine(self, features: Tensor, retrieved: Tensor) -> Tensor:
        """Put what is retrieved to the features of a block.

        Args:
            features (Tensor): Features of the block.
            retrieved (Tensor): What its attention retrieves, of the same shape.

        Returns:
            Tensor: Of the same shape.
        """
        return features + self.drop_path(retrieved)

    @classmethod
    def is_branch(cls, arguments: dict) -> bool:
        """Whether it adds a branch to its block, which stochastic depth may drop.

        Args:
            arguments (dict): Arguments of the constructor.

        Returns:
            bool: True if so: then it has the stochastic depth of its block by
            default. Otherwise what is retrieved takes the place of the output.
        """
        return True

    def opens_token(self, before: Optional['LayerAttention']) -> bool:
        """Whether its block is a token of its own for the attentions of the stage.

        Args:
            before (LayerAttention, optional): The last one before it that is not
                pruned; None for the first.

        Returns:
            bool: False where it belongs to the token of that.
        """
        return True

    def connect(self, block: nn.Module) -> Tuple[Dict[str, str], Dict[str, nn.Module]]:
        """Meet the block, for attentions that reach into it.

        Args:
            block (nn.Module): The block, which is not changed here.

        Returns:
            tuple[dict[str, str], dict[str, nn.Module]]: By name of a submodule of
            the block, the method that sees its output, see
            :class:`mmela.layers.stage.Tap`; and what takes the place of
            submodules.
        """
        return {}, {}

    # -- what is left of it --------------------------------------------------

    @property
    def active(self) -> bool:
        """bool: Whether the attention is computed."""
        return self.attention_state == AttentionState.ACTIVE

    @property
    def reached(self) -> bool:
        """bool: Whether a forward pass has come to it, where it has a place."""
        return self.place is None or self.place.stage.reached[self.place.index]

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
        if not is_compiling() and self._state_changed():
            # By somebody else: an averaged copy, a loader, another network's state
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
        """Set the mode, and read the state again: averages of networks are written
        where their version does not tell, and evaluated after that."""
        super().train(mode)
        self._seen: Tuple[Any, Any] = (None, None)
        return self

    def _note_state(self) -> None:
        version = None if self.state.is_inference() else self.state._version
        self._seen = self.state, version

    def _state_changed(self) -> bool:
        """Whether the buffer was written to; that costs no synchronization."""
        seen, version = self._seen
        if torch._C._functorch.is_functorch_wrapped_tensor(self.state):
            return False  # under vmap it is no one value
        if self.state is not seen:
            # Replicas have the state of the network that they are of.
            return not (self.state.is_meta or getattr(self, '_is_replica', False))
        if self.training and torch.is_grad_enabled():
            return False  # distributed training writes the buffer in each pass
        return not self.state.is_inference() and self.state._version != version

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

    def fingerprint(self) -> str:
        """What tells attentions apart whose parameters look the same.

        Returns:
            str: Class and arguments. A checkpoint holds it as ``signature`` and
            does not load into an attention with another.
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
                    f'the checkpoint holds {text!r} at {prefix[:-1]}, but the '
                    f'network has {self.fingerprint()!r} there'
                )
        state_dict[prefix + 'signature'] = self.signature.detach().clone()

    def _load_state(self, state_dict: dict, prefix: str) -> None:
        key = prefix + 'state'
        if key not in state_dict:
            raise RuntimeError(
                f'the checkpoint has weights of {prefix[:-1]} but no {key}, so it is '
                'not known whether that is pruned; save the buffers too'
            )
        if state_dict[key].is_meta:
            return
        try:
            state, exact = decode(state_dict[key])
        except ValueError as error:
            raise RuntimeError(f'{key}: {error}') from error
        if not exact:
            print_log(
                f'{key} is {float(state_dict[key]):g}: an average of networks of '
                'which some have pruned this attention and others have not. It is '
                f'taken as {state.name}.',
                'current',
                level=30,
            )
        self.attention_state = state
        state_dict[key] = self.state.detach().clone()

    def extra_repr(self) -> str:
        return f'channels={self.channels}, {self.fingerprint()}, {self._state.name}'


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
        init_cfg (dict | list[dict], optional): Initialization config. Defaults
            to None.
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
                    f'small_init={small_init} starts with another normalization '
                    'weight than zero_init=True; set one of them'
                )
            check_number('small_init', small_init, 0, 1, open_low=True)
        self.zero_init = zero_init
        self.small_init = small_init
        # Before the value: tools that fold a norm into the convolution registered
        # before it must not take the two for a pair.
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
        # What is added to class tokens passes no norm, so there the scale counts.
        if self.from_plain and (norm_cfg is None or token_norm_cfg):
            self.scale = nn.Parameter(torch.zeros(channels))
        if token_norm_cfg:
            with building('token_norm_cfg', token_norm_cfg):
                self.pre_norm = build_norm_layer(token_norm_cfg, channels)[1]
        self.reset_parameters()

    relu = True
    """bool: Whether :meth:`norm_relu` has a ReLU after the normalization."""

    @property
    def from_plain(self) -> bool:
        """bool: Whether it is for a network that starts from plain weights."""
        return self.zero_init or self.small_init is not None

    def reset_parameters(self) -> None:
        """Draw new weights."""
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
        if self.scale is not None:
            nn.init.constant_(self.scale, weight)
            weight = 1.0
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, weight)
            nn.init.constant_(self.norm.bias, 0.0)

    def init_weights(self) -> None:
        """Initialize the weights, after those that a parent set by type."""
        if self.init_cfg:
            super().init_weights()
        else:
            self.reset_parameters()
            self._is_init = True

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        has_norm = f'{prefix}norm.weight' in state_dict
        if self.scale is not None and self.norm is not None and has_norm:
            # Versions before 0.2 had no scale beside a norm.
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
