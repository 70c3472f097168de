import math
from abc import ABCMeta, abstractmethod
from enum import IntEnum
from typing import List, Optional

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops.layer_weighted_sum import Value


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


class LayerMemory:
    """What the blocks of one stage share during one forward pass.

    Attributes:
        keys (list[Tensor]): Keys of the blocks so far, each (B, G, d).
        values (list[Tensor | SharedValue]): Values of the blocks so far, each
            (B, C, H, W).
        scores (list[Tensor]): Scaled scores before the softmax of each active
            attention so far, (B, G, t) with ``t`` the number of tokens that it
            attends over.
        identity (Tensor, optional): Identity input of the current block after
            its downsample, (B, C, H, W), where its attention needs it.
        output (Tensor, optional): ``O^(t-1)`` where attentions are recurrent,
            (B, C, H, W): what the attention before retrieved, without norm.
        inputs (list[Tensor]): Outputs of the blocks so far, each
            (B, C, H, W), where later attentions transform them.
        pooled (list[Tensor]): The same averaged over space, each (B, 1, C).
        mean (Tensor, optional): Weighted mean of the block outputs so far,
            (B, C, H, W), where attentions keep one.
        mass (Tensor, optional): Sum of the weights in ``mean``, (B, G).
        previous (LayerMemory, optional): Memory that the stage before has
            ended with, where attention crosses stages.
    """

    def __init__(self) -> None:
        self.keys: List[Tensor] = []
        self.values: List[Value] = []
        self.scores: List[Tensor] = []
        self.identity: Optional[Tensor] = None
        self.output: Optional[Tensor] = None
        self.inputs: List[Tensor] = []
        self.pooled: List[Tensor] = []
        self.mean: Optional[Tensor] = None
        self.mass: Optional[Tensor] = None
        self.previous: Optional['LayerMemory'] = None


class LayerAttention(BaseModule, metaclass=ABCMeta):
    """Layer attention of one residual block.

    A subclass says in :meth:`retrieve` what the block gets from the earlier
    blocks of its stage, and in :meth:`store` what a block leaves for the later
    ones although it does not attend itself.

    Args:
        channels (int): Channels ``C`` of the block's output.
        head_dim (int): Channels ``d`` of one head. Defaults to 32.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: If ``channels`` is no multiple of ``head_dim``.
    """

    prunable = False
    """bool: Whether the attention yields a distribution over layers, which is
    what redundancy is measured on."""

    needs_identity = False
    """bool: Whether the stage shall hand over the identity input of the
    block, as ``memory.identity``."""

    adds_in_place = False
    """bool: Whether no backward pass needs what :meth:`retrieve` returns, so
    that the block's output may be added to it in place."""

    crosses_stages = False
    """bool: Whether the first attention of a stage takes over the memory of
    the stage before. Its constructor then takes ``previous_channels`` and
    ``stride``."""

    def __init__(
        self, channels: int, head_dim: int = 32, init_cfg: Optional[dict] = None
    ) -> None:
        super().__init__(init_cfg)
        if head_dim < 1 or channels % head_dim:
            divisors = [d for d in range(1, channels + 1) if channels % d == 0]
            raise ValueError(
                f'head_dim={head_dim} does not divide the {channels} channels '
                f'of a block; allowed are {divisors}'
            )
        self.channels = channels
        self.head_dim = head_dim
        self.num_heads = channels // head_dim
        self._state = AttentionState.ACTIVE
        self._disabled: List[str] = []
        # The state travels in the checkpoint as a buffer; the forward pass
        # reads `_state`, so that it never waits for the device.
        self.register_buffer('state', torch.tensor(0, dtype=torch.uint8))

    @property
    def active(self) -> bool:
        """bool: Whether the attention is computed."""
        return self._state == AttentionState.ACTIVE

    @property
    def attention_state(self) -> AttentionState:
        """AttentionState: What is left of the attention."""
        return self._state

    @attention_state.setter
    def attention_state(self, state: AttentionState) -> None:
        self._state = AttentionState(state)
        self.state.fill_(int(self._state))
        self._sync_requires_grad()

    def retained_parameters(self) -> List[str]:
        """Names of the parameters that ``VALUE_ONLY`` still uses."""
        return []

    def _sync_requires_grad(self) -> None:
        """Take the parameters that the state leaves unused out of training.

        Only what was disabled here is enabled again, so that a frozen stage
        stays frozen.
        """
        unused = set()
        if self._state != AttentionState.ACTIVE:
            unused = set(dict(self.named_parameters()))
            if self._state == AttentionState.VALUE_ONLY:
                unused -= set(self.retained_parameters())
        for name, param in self.named_parameters():
            if name in unused and param.requires_grad:
                param.requires_grad_(False)
                param.grad = None
                self._disabled.append(name)
            elif name not in unused and name in self._disabled:
                param.requires_grad_(True)
                self._disabled.remove(name)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + 'state' in state_dict:
            self.attention_state = AttentionState(int(self.state))

    def extra_repr(self) -> str:
        return (
            f'channels={self.channels}, head_dim={self.head_dim}, '
            f'state={self._state.name}'
        )

    def forward(self, x: Tensor, memory: LayerMemory) -> Tensor:
        """Add to a block's output what it retrieves from earlier blocks.

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (LayerMemory): Memory of the stage, which this extends.

        Returns:
            Tensor: (B, C, H, W).
        """
        if self._state == AttentionState.ACTIVE:
            return self.attend(x, memory)
        if self._state == AttentionState.VALUE_ONLY:
            self.store(x, memory)
        return x

    def attend(self, x: Tensor, memory: LayerMemory) -> Tensor:
        """Extend the memory, attend over it and add the result to ``x``."""
        out = self.retrieve(x, memory)
        if self.adds_in_place and out.dtype == x.dtype:
            # No new memory, which a CPU takes as long to get as to add
            return out.add_(x)
        return x + out

    @abstractmethod
    def retrieve(self, x: Tensor, memory: LayerMemory) -> Tensor:
        """Extend the memory and attend over it.

        Args:
            x (Tensor): Output ``X^t`` of the residual block, (B, C, H, W).
            memory (LayerMemory): Memory of the stage, which this extends.

        Returns:
            Tensor: What is added to ``x``, (B, C, H, W).
        """

    def store(self, x: Tensor, memory: LayerMemory) -> None:
        """Extend the memory without attending over it."""
        raise NotImplementedError(f'{type(self).__name__} has no key and value to keep')


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
