"""Stages: what runs the layer attentions of consecutive residual blocks.

Where a backbone calls whole stages, a :class:`SequentialAttentionStage` takes
the place of the stage. Where it loops over its blocks itself, a
:class:`HookedAttentionStage` runs the attentions from forward hooks.
"""

import threading
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from mmengine.model import Sequential
from torch import Tensor, nn

from .base import AttentionState, LayerAttention, StageMemory


class _Running(threading.local):
    """What the forward passes of a thread have at hand.

    Nothing of a pass is kept in modules, so that threads do not meet there and
    an exception leaves nothing behind.
    """

    def __init__(self) -> None:
        # Of each pass, the innermost last, what belongs to it, by module
        self.passes: List[Dict[Any, Any]] = []
        # Outputs asked for, by module
        self.outputs: Dict[nn.Module, Optional[Tensor]] = {}
        # Memories of the sequential stages within a block that asks for them
        self.memories: Dict[nn.Module, StageMemory] = {}


_running = _Running()


@contextmanager
def forward_pass() -> Iterator[None]:
    """Context of a forward pass of a network with several stages.

    Backbones of mmela enter it by themselves. A network of one's own needs it
    for hooked stages and for attentions that cross stages.
    """
    _running.passes.append({})
    try:
        yield
    finally:
        _running.passes.pop()


def enter_pass(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a network: a :func:`forward_pass` begins."""
    _running.passes.append({})


def leave_pass(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a network, always called: its pass ends."""
    _running.passes.pop()


def current_pass() -> Dict[Any, Any]:
    """What belongs to the innermost :func:`forward_pass` of this thread.

    Returns:
        dict: Memories and the like, by the module that they are of; empty and
        of no use where there is no pass.
    """
    return _running.passes[-1] if _running.passes else {}


class AttentionStage(nn.Module):
    """What the stages of all networks have in common.

    Attributes:
        observer (callable, optional): Called after each forward pass with the
            scores of the active attentions, a list of (B, G, t) tensors
            without gradient. Defaults to None, which costs nothing.
        left_out (bool): Whether the blocks have no attention because they are
            frozen and it would stay zero. Defaults to False.
    """

    observer: Optional[Callable[[List[Tensor]], None]] = None
    _channels_first = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # In a tuple, so that it does not become a submodule
        self._before: Tuple['AttentionStage', ...] = ()
        self._hands_over = False
        self.left_out = False

    def named_attentions(self) -> Dict[str, LayerAttention]:
        """Layer attentions of the blocks.

        Returns:
            dict[str, LayerAttention]: By name within the stage, such as
            ``0.layer_attn``, in the order of the forward pass; pruned ones
            too.
        """
        return {
            f'{name}.layer_attn': block.layer_attn
            for name, block in self.named_children()
            if hasattr(block, 'layer_attn')
        }

    @property
    def attentions(self) -> List[LayerAttention]:
        """list[LayerAttention]: The values of :meth:`named_attentions`."""
        return list(self.named_attentions().values())

    def take_over_from(self, stage: 'AttentionStage') -> None:
        """Start with the memory that another stage has ended with.

        Args:
            stage (AttentionStage): The stage that runs before this one.
        """
        self._before = (stage,)
        stage._hands_over = True

    def attend(
        self, attention: LayerAttention, output: Tensor, memory: StageMemory, *args
    ) -> Tensor:
        """Run the attention of a block as far as it is not pruned.

        Args:
            attention (LayerAttention): The attention.
            output (Tensor): Output of the block, (B, C, H, W).
            memory (StageMemory): Memory of the stage.
            *args: Arguments of the block, where the stage needs them.

        Returns:
            Tensor: The output with what the attention retrieves.
        """
        state = attention.attention_state
        if state == AttentionState.PRUNED or attention.before_sum:
            return output
        x, restore = self._to_map(attention, output, args)
        if state == AttentionState.VALUE_ONLY:
            attention.store(x, memory)
            return output
        retrieved = restore(attention(x, memory))
        if attention.scale is not None:
            # Here and not in the attention, as it counts for class tokens too
            scale = attention.scale.to(retrieved.dtype)
            on_maps = self._channels_first
            retrieved = retrieved * (scale[:, None, None] if on_maps else scale)
        if attention.replaces:
            return retrieved
        return output + attention.drop_path(retrieved)

    def connect(self, attention: LayerAttention, block: nn.Module) -> None:
        """Have an attention reach into its block, where it does.

        Args:
            attention (LayerAttention): The attention.
            block (nn.Module): Its block.

        Raises:
            ValueError: If activation checkpointing computes the block twice,
                which the memory does not stand.
        """
        taps = attention.connect(block)
        if taps and attention.needs_memory and getattr(block, 'with_cp', False):
            raise ValueError(
                f'with_cp=True computes a block twice, but {type(attention).__name__} '
                'changes the memory of its stage within the block; set with_cp=False'
            )
        for module, method in taps:
            module.register_forward_hook(_Tap(self, attention, method))

    def memory_at_hand(self) -> Optional[StageMemory]:
        """The memory of the forward pass that a block is running in, if any."""
        return _running.memories.get(self)

    def _to_map(
        self, attention: LayerAttention, output: Tensor, args: tuple
    ) -> Tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What the attention sees, and how the result gets the form of the output."""
        return output, lambda retrieved: retrieved

    def _begin(self, x: Tensor) -> StageMemory:
        """Memory of a new forward pass with the input ``x``."""
        attentions = self.attentions
        memory = attentions[0].Memory() if attentions else StageMemory()
        if self._before:
            memory.before = self._taken_over(x)
        return memory

    def _taken_over(self, x: Tensor) -> StageMemory:
        memories = current_pass()
        before = memories.pop(self._before[0], None)
        tensors = [
            t for t in vars(before or StageMemory()).values() if torch.is_tensor(t)
        ]
        lost = tensors and not any(t.requires_grad for t in tensors)
        if before is None or x.requires_grad and lost:
            what = 'is not there' if before is None else 'has no gradient'
            raise RuntimeError(
                'the layer attention of a stage takes over the memory of the stage '
                f'before, which {what}. That is so where activation checkpointing '
                'runs whole stages: use with_cp=True, which checkpoints blocks, or '
                'cross_stage=False. Stages of a network of your own run within '
                'mmela.layers.forward_pass().'
            )
        return before

    def _end(self, memory: StageMemory) -> None:
        """Pass on what a forward pass has left in its memory."""
        if self.observer is not None:
            self.observer([scores.detach() for scores in memory.scores])
        if self._hands_over:
            current_pass()[self] = memory

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Accept what older versions wrote of attentions that are left out."""
        if self.left_out:
            for key in [k for k in state_dict if k.startswith(prefix)]:
                block, _, rest = key[len(prefix) :].partition('.layer_attn.')
                if rest in ('norm.weight', 'scale') and state_dict[key].any():
                    raise RuntimeError(
                        'the checkpoint has a trained layer attention at '
                        f'{prefix}{block}, but the network has none there, as '
                        'the stage is frozen and zero_init or small_init is set; '
                        'set neither to use it'
                    )
                if rest:
                    del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


class SequentialAttentionStage(AttentionStage, Sequential):
    """The residual blocks of one stage, each followed by its layer attention.

    A block carries its attention as ``layer_attn``; a block without one is a
    plain residual block.

    Args:
        *blocks (nn.Module): The blocks.
    """

    def attach(self, index: int, attention: LayerAttention) -> None:
        """Give a block its layer attention.

        Args:
            index (int): Index of the block.
            attention (LayerAttention): Its attention.
        """
        block = self[index]
        block.layer_attn = attention
        downsample = getattr(block, 'downsample', None)
        if attention.needs_identity and downsample is not None:
            downsample.register_forward_hook(_keep_output)
        self.connect(attention, block)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order.

        Args:
            x (Tensor): Input of the stage, (B, C_in, H_in, W_in).

        Returns:
            Tensor: Output of the last block, (B, C, H, W).
        """
        memory = self._begin(x)
        for block in self:
            attention = getattr(block, 'layer_attn', None)
            if attention is None:
                x = block(x)
                continue
            if attention.needs_identity and attention.active:
                x, memory.identity = _run_with_identity(block, x)
            elif attention.before_sum:
                _running.memories[self] = memory
                try:
                    x = block(x)
                finally:
                    del _running.memories[self]
            else:
                x = block(x)
            x = self.attend(attention, x, memory)
        self._end(memory)
        return x


class HookedAttentionStage(AttentionStage):
    """Layer attentions of blocks that a backbone calls by itself.

    For backbones whose forward pass loops over blocks that are not a
    ``Sequential`` of one stage each, such as transformers. The blocks stay
    where the backbone has them, with their keys; this module holds their
    attentions as ``<block>.layer_attn`` and runs each from a forward hook. A
    block may return several things, of which the first is its output.

    Args:
        blocks (Sequence[nn.Module]): The blocks of the stage, in order.
        names (Sequence[str], optional): Their names in the backbone, which
            name the attentions, with ``-`` for dots. Defaults to None, which
            means their indices.
        shortcuts (dict[int, nn.Module], optional): By index of the block, the
            module that brings its input to the shape of its output, such as a
            downsample. Defaults to None: inputs have that shape.

    Attributes:
        blocks (tuple[nn.Module]): The blocks.
        names (tuple[str]): Their names.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        names: Optional[Sequence[str]] = None,
        shortcuts: Optional[Dict[int, nn.Module]] = None,
    ) -> None:
        super().__init__()
        # In tuples, so that they do not become submodules
        self.blocks = tuple(blocks)
        self.names = tuple(names or map(str, range(len(blocks))))
        self._slots = tuple(
            # A name that is one of this module's own attributes gets a dash
            f'{name}-' if hasattr(self, name) else name.replace('.', '-')
            for name in self.names
        )
        self._shortcuts = tuple((shortcuts or {}).items())
        # Where attentions work within the blocks: before the first block runs
        self._begins_early = False
        for index, block in enumerate(blocks):
            block.register_forward_hook(_Hook(self, index), with_kwargs=True)

    def attach(self, index: int, attention: LayerAttention) -> None:
        """Give a block its layer attention.

        Args:
            index (int): Index of the block.
            attention (LayerAttention): Its attention.
        """
        slot = nn.ModuleDict(dict(layer_attn=attention))
        self.add_module(self._slots[index], slot)
        shortcut = dict(self._shortcuts).get(index)
        if attention.needs_identity and shortcut is not None:
            shortcut.register_forward_hook(_keep_in_pass)
        if attention.before_sum and not self._begins_early:
            self._begins_early = True
            self.blocks[0].register_forward_pre_hook(_Begin(self))
        self.connect(attention, self.blocks[index])

    def begin(self, x: Tensor) -> None:
        """Begin a forward pass with the input ``x`` of the first block."""
        current_pass()[self] = self._begin(x)

    def memory_at_hand(self) -> Optional[StageMemory]:
        return current_pass().get(self)

    def attention_of(self, index: int) -> Optional[LayerAttention]:
        """Layer attention of a block.

        Args:
            index (int): Index of the block.

        Returns:
            LayerAttention | None: None if it has none.
        """
        slot: Any = self._modules.get(self._slots[index])
        return None if slot is None else slot.layer_attn

    def named_attentions(self) -> Dict[str, LayerAttention]:
        """As that of :class:`AttentionStage`."""
        found = [(slot, self._modules.get(slot)) for slot in self._slots]
        return {f'{name}.layer_attn': m.layer_attn for name, m in found if m}

    def run(self, index: int, args: tuple, output: Any) -> Any:
        """Run what follows a block.

        Args:
            index (int): Index of the block.
            args (tuple): Its arguments; the first is its input.
            output (Tensor | tuple | list): Its output.

        Returns:
            Tensor | tuple | list: The output with what its attention
            retrieves.

        Raises:
            RuntimeError: If there is no :func:`forward_pass`, or it began
                after the first block.
        """
        memories = current_pass()
        if index == 0 and not self._begins_early:
            self.begin(args[0])
        if self not in current_pass():
            raise RuntimeError(
                f'block {index} of a stage with layer attention runs without the '
                'blocks before it, or outside of its backbone; run it within '
                'mmela.layers.forward_pass() from the first block on'
            )
        memory = memories[self]
        attention = self.attention_of(index)
        if attention is not None:
            if attention.needs_identity and attention.active:
                memory.identity = self._identity(index, attention, args, output)
            if isinstance(output, (tuple, list)):
                first = self.attend(attention, output[0], memory, args, output)
                output = type(output)([first, *output[1:]])
            else:
                output = self.attend(attention, output, memory, args, output)
        if index == len(self.blocks) - 1:
            del memories[self]
            self._end(memory)
        return output

    def _identity(
        self, index: int, attention: LayerAttention, args: tuple, output: Any
    ) -> Tensor:
        """Identity input of a block that is called with ``args``."""
        shortcut = dict(self._shortcuts).get(index)
        if shortcut is None:
            return args[0]
        identity = current_pass().pop(shortcut, None)
        out = output[0] if isinstance(output, (tuple, list)) else output
        if identity is None or out.requires_grad and not identity.requires_grad:
            # As in `_run_with_identity`: reentrant checkpointing
            identity = shortcut(args[0])
            current_pass().pop(shortcut, None)
        return identity

    def freeze_with_blocks(self) -> None:
        """Freeze the attentions of blocks that have no trainable parameter."""
        for index, block in enumerate(self.blocks):
            attention = self.attention_of(index)
            if attention is not None and is_frozen(block):
                attention.eval().requires_grad_(False)


class TokenAttentionStage(HookedAttentionStage):
    """Layer attentions of transformer layers (MRLA, algorithms 2 and 4).

    The patch tokens are normalized and attended over as a (B, C, H, W) map.
    Class and distillation tokens stay apart: what is added to them is their
    own normalized value. Attentions have their ``token_norm_cfg`` set.

    Args:
        blocks (Sequence[nn.Module]): The layers of the stage, in order; their
            input and output are tokens, (B, L, C), or (B, H, W, C).
        resolution (callable, optional): Takes the arguments and the output of
            a layer and returns height and width of the map. Not asked for
            (B, H, W, C). Defaults to None.
        num_extra_tokens (int): Number of tokens that precede the patch tokens.
            Defaults to 0.
        **kwargs: ``names`` of :class:`HookedAttentionStage`.
    """

    _channels_first = False

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        resolution: Optional[Callable[[tuple, Any], Tuple[int, int]]] = None,
        num_extra_tokens: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(blocks, **kwargs)
        self.resolution = resolution
        self.num_extra_tokens = num_extra_tokens

    def _to_map(self, attention, output, args):
        tokens = attention.pre_norm(output)
        if tokens.dim() == 4:
            return tokens.permute(0, 3, 1, 2), lambda y: y.permute(0, 2, 3, 1)
        extra = tokens[:, : self.num_extra_tokens]

        def restore(retrieved: Tensor) -> Tensor:
            # Joined before stochastic depth: one draw for all of a sample
            return torch.cat([extra, retrieved.flatten(2).transpose(1, 2)], dim=1)

        return self._patches(tokens, *args), restore

    def _identity(self, index, attention, args, output):
        tokens = attention.identity_norm(args[0])
        if tokens.dim() == 4:
            return tokens.permute(0, 3, 1, 2)
        return self._patches(tokens, args, output)

    def _patches(self, tokens: Tensor, args: tuple, output: Any) -> Tensor:
        """(B, L, C) to (B, C, H, W), without the extra tokens."""
        patches = tokens[:, self.num_extra_tokens :].transpose(1, 2)
        return patches.unflatten(2, tuple(self.resolution(args, output)))


class _Hook:
    """Forward hook of a block.

    An object and no closure, so that a copy of the backbone has hooks that
    point to its own stages.
    """

    def __init__(self, stage: HookedAttentionStage, index: int) -> None:
        self.stage = stage
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any):
        return self.stage.run(self.index, (*args, *kwargs.values()), output)


class _Begin:
    """Forward pre-hook of the first block of a hooked stage."""

    def __init__(self, stage: HookedAttentionStage) -> None:
        self.stage = stage

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.stage.begin(args[0])


class _Tap:
    """Forward hook of what an attention reaches into; an object as :class:`_Hook`."""

    def __init__(
        self, stage: AttentionStage, attention: LayerAttention, method: str
    ) -> None:
        self.stage = stage
        self.attention = attention
        self.method = method

    def __call__(
        self, module: nn.Module, args: tuple, output: Tensor
    ) -> Optional[Tensor]:
        if not self.attention.active:
            return None
        memory = self.stage.memory_at_hand()
        if memory is None and self.attention.needs_memory:
            raise RuntimeError(
                f'a block with {type(self.attention).__name__} runs outside of its '
                'stage, which has the memory'
            )
        return getattr(self.attention, self.method)(args[0], output, memory)


def is_frozen(block: nn.Module) -> bool:
    """Whether a block has no trainable parameter.

    Args:
        block (nn.Module): The block.

    Returns:
        bool: True if nothing in it is trained.
    """
    return not any(param.requires_grad for param in block.parameters())


def _run_with_identity(block: nn.Module, x: Tensor) -> Tuple[Tensor, Tensor]:
    """Run a residual block and get hold of its identity input.

    Args:
        block (nn.Module): A residual block of a toolbox.
        x (Tensor): Its input, (B, C_in, H_in, W_in).

    Returns:
        tuple[Tensor, Tensor]: Its output and the identity that it adds, ``x``
        after the downsample if it has one; each (B, C, H, W).
    """
    downsample = getattr(block, 'downsample', None)
    if downsample is None:
        return block(x), x
    # The toolboxes' blocks return no identity. To compute it here as well
    # would cost 9 % of a ResNet-50, so a hook keeps what the block computes.
    _running.outputs[downsample] = None
    try:
        out = block(x)
    finally:
        identity = _running.outputs.pop(downsample)
    if identity is None or out.requires_grad and not identity.requires_grad:
        # No hook, or the block ran under reentrant checkpointing (`with_cp`),
        # which computes without gradients at first. Only here it is computed
        # once more.
        identity = downsample(x)
    return out, identity


def _keep_in_pass(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook: keep the output in the forward pass."""
    current_pass()[module] = output


def _keep_output(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook: keep the output while this thread asks for it."""
    if module in _running.outputs:
        _running.outputs[module] = output
