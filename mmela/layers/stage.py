"""A stage: consecutive blocks whose attentions share a memory.

An attention is the submodule ``layer_attn`` of its block and runs from the block's
hooks, :func:`before_block` and :func:`after_block`. The hooks act on the module that
they are called with, so copies and replicas of a network are independent. The state of
a forward pass is kept per thread and not in modules; :class:`PassHook`, a hook of the
network, drops it when the pass ends in any way.
"""

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..ops import is_compiling
from .base import LayerAttention, StageMemory
from .features import Features, tensors


class Stage:
    """The state that the attentions of one stage share. It holds no module.

    Args:
        blocks (Sequence[str]): Names of all blocks of the stage in the network, in
            the order in which they run, including those without an attention.
        number (int): Its index among the stages of the network. Defaults to 0.

    Attributes:
        before (Stage, optional): The stage whose memory this one starts from.
        size (int): Number of attentions.
        reached (list[bool]): For each attention, whether it has run in this network
            or in one of its replicas.
        hands_over (bool): Whether another stage starts from its memory.
        observer (callable, optional): Called after each forward pass with the
            scores of the active attentions, those of
            :class:`mmela.layers.StageMemory`, without gradient. None, the default,
            costs nothing.
    """

    def __init__(self, blocks: Sequence[str], number: int = 0) -> None:
        self.blocks = tuple(blocks)
        self.number = number
        self.before: Optional[Stage] = None
        self.set_size(0)
        self.hands_over = False
        self.observer: Optional[Callable[[List[Tensor]], None]] = None

    def set_size(self, size: int) -> None:
        """Set the number of attentions and mark all of them as not reached."""
        self.size = size
        self.reached = [False] * size

    def __getstate__(self) -> dict:
        return {**vars(self), 'observer': None}  # a copy is not measured


@dataclass(frozen=True)
class Place:
    """The place of an attention in its network: plain values, equal in all copies.

    Attributes:
        stage (Stage): Its stage.
        block (str): Name of its block in the network.
        index (int): Index among the attentions of the stage.
        features (Features): Where the block's output holds the features.
        inputs (tuple): Path to the features in the block's positional arguments.
        shortcut (str, optional): Name, in the block, of the module that brings the
            input to the shape of the output. Defaults to None: the shapes agree.
        changes_input (bool): Whether the block writes into its input. Defaults to
            False.
    """

    stage: Stage
    block: str
    index: int
    features: Features = field(default_factory=Features)
    inputs: Tuple[Any, ...] = (0,)
    shortcut: Optional[str] = None
    changes_input: bool = False


class _Run:
    """The progress of a stage in one forward pass."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory  # the ``Memory`` of the attention class
        self.done = 0  # blocks with an attention that have run
        self.block: Optional[nn.Module] = None  # the block that is running
        self.version: Optional[int] = None  # version of its input
        self.with_grad = torch.is_grad_enabled()


class _Running(threading.local):
    def __init__(self) -> None:
        self.runs: Dict[Stage, _Run] = {}
        self.handed_over: Dict[Stage, StageMemory] = {}
        self.passes: Dict[Stage, int] = {}  # number of the pass each stage is in

    def drop(self, stage: Stage) -> None:
        self.runs.pop(stage, None)
        self.handed_over.pop(stage, None)


_running = _Running()
_pass_numbers = itertools.count()


class _Arguments(dict):
    """Keyword arguments of a running network, which hold the state of its pass.

    Only the frame of the call refers to them. So they are freed, and the state with
    them, when the call ends in any way, even by Ctrl-C, which calls no hook.
    """

    stages: Sequence[Stage] = ()
    number = -1

    def __del__(self) -> None:
        for stage in self.stages:
            # A traceback may keep the frame alive beyond the start of the next pass
            if _running.passes.get(stage) == self.number:
                del _running.passes[stage]
                _running.drop(stage)


class PassHook:
    """Forward pre-hook of a network that clears the state of earlier passes.

    Register it with ``with_kwargs=True``.

    Args:
        stages (Sequence[Stage]): The stages of the network.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)

    def __call__(
        self, network: nn.Module, args: tuple, kwargs: dict
    ) -> Optional[Tuple[tuple, dict]]:
        if is_compiling():
            return None
        arguments = _Arguments(kwargs)
        arguments.stages, arguments.number = self.stages, next(_pass_numbers)
        for stage in self.stages:
            _running.drop(stage)
            _running.passes[stage] = arguments.number
        return args, arguments


def attach_hooks(block: nn.Module) -> List[Any]:
    """Register the hooks that run a block's ``layer_attn``.

    Args:
        block (nn.Module): The block.

    Returns:
        list: Handles that remove the hooks.
    """
    return [
        block.register_forward_pre_hook(before_block, with_kwargs=True),
        # First, so that other hooks see the output with the attention
        block.register_forward_hook(after_block, with_kwargs=True, prepend=True),
    ]


def before_block(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a block: start or continue the run of its stage.

    Args:
        block (nn.Module): The block, with its attention as ``layer_attn``.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.

    Raises:
        RuntimeError: If an earlier block of the stage has not run in this pass.
    """
    attention: Any = block.layer_attn
    place: Place = attention.place
    everything = (*args, *kwargs.values())
    if place.index == 0:
        run = _start(attention, everything)
    else:
        run = _current(place, everything)
    _running.runs[place.stage] = run
    run.block = block
    if attention.needs_identity:
        x = _input(place, everything)
        run.memory.identity = x.clone() if place.changes_input else x
        run.version = None if is_compiling() or x.is_inference() else x._version
    if not is_compiling():
        for name, method in attention.taps.items():
            ensure_tap(block, name, attention, method)


def after_block(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of a block: run its attention unless it is pruned.

    Args:
        block (nn.Module): The block.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.
        output (Any): Its output.

    Returns:
        Any: The output with the retrieved features added.

    Raises:
        RuntimeError: If the output does not have the form that it had when the
            attention was attached; the error names the block.
    """
    attention: Any = block.layer_attn
    place: Place = attention.place
    stage = place.stage
    run = _running.runs.get(stage)
    if run is None or run.block is not block:
        raise RuntimeError(
            f'layer attention: block {place.block} calls itself; leave it out with '
            'blocks=[...]'
        )
    # Delete it first, so that an error below leaves nothing behind.
    del _running.runs[stage]
    run.block = None
    run.done += 1
    stage.reached[place.index] = True
    everything = (*args, *kwargs.values())
    try:
        x = place.features.get(output)
        if attention.needs_identity and attention.active:
            _complete_identity(block, run, everything, output)
        new = attention.update(x, run.memory, everything, output)
    except ValueError as error:
        raise RuntimeError(
            f'layer attention: block {place.block} {error}. Leave it out with '
            'blocks=[...]'
        ) from error
    if run.done < stage.size:
        _running.runs[stage] = run
    else:
        _finish(stage, run.memory)
    return output if new is x else place.features.put(output, new)


def _start(attention: LayerAttention, args: tuple) -> _Run:
    """Begin a stage, and drop what an interrupted pass may have left."""
    stage = attention.place.stage
    memory: Any = attention.Memory()
    memory.first = attention
    if stage.before is not None:
        memory.before = _taken_over(stage.before, args)
    return _Run(memory)


def _current(place: Place, args: tuple) -> _Run:
    """The run of the stage in the current pass."""
    run = _running.runs.get(place.stage)
    if run is None or run.block is not None or run.done != place.index:
        _running.runs.pop(place.stage, None)
        raise RuntimeError(
            f'layer attention: block {place.block} runs, but not all earlier blocks of '
            f'its stage ({", ".join(place.stage.blocks)}) have run in this pass. A '
            'block cannot have an attention if it is skipped at random, runs alone, or '
            'is rerun by activation checkpointing around it; leave it out with '
            'blocks=[...]. For checkpointing, use with_cp=True, which works within '
            'the block'
        )
    if not run.with_grad and _need_grad(args):
        _running.runs.pop(place.stage, None)
        raise RuntimeError(
            f'layer attention: block {place.block} runs with gradients, but earlier '
            f'blocks of its stage ({", ".join(place.stage.blocks)}) ran without, as '
            'happens if reentrant activation checkpointing runs a part of a stage. Use '
            'use_reentrant=False, or with_cp=True, which checkpoints blocks'
        )
    return run


def _need_grad(args: tuple) -> bool:
    """Whether a gradient is to flow back through the arguments of a block."""
    return torch.is_grad_enabled() and any(t.requires_grad for _, t in tensors(args))


def _taken_over(before: Stage, args: tuple) -> StageMemory:
    """The final memory of the previous stage."""
    memory = _running.handed_over.pop(before, None)
    stored = (
        [] if memory is None else list(filter(torch.is_tensor, vars(memory).values()))
    )
    detached = stored and not any(t.requires_grad for t in stored)
    if memory is None or detached and _need_grad(args):
        raise RuntimeError(
            'layer attention: a stage starts from the memory of the previous stage '
            f'({", ".join(before.blocks)}), which '
            f'{"does not exist" if memory is None else "has no gradient"}, as happens '
            'if activation checkpointing runs whole stages. Use with_cp=True, which '
            'checkpoints blocks, or set cross_stage=False'
        )
    return memory


def _finish(stage: Stage, memory: StageMemory) -> None:
    """Give the memory of a finished pass to the observer and the next stage."""
    if stage.observer is not None:
        stage.observer([scores.detach() for scores in memory.scores])
    if stage.hands_over:
        memory.first = None
        _running.handed_over[stage] = memory


# -- access to the inside of a block --------------------------------------------


def _input(place: Place, everything: tuple) -> Tensor:
    """The features in the arguments of a block."""
    features: Any = everything
    for key in place.inputs:
        features = features[key]
    return features


def _complete_identity(
    block: nn.Module, run: _Run, everything: tuple, output: Any
) -> None:
    """Store the identity that a block has added, as a map, in the memory."""
    attention: Any = block.layer_attn
    place, memory = attention.place, run.memory
    x = _input(place, everything)
    if place.shortcut is not None:
        # A tap has stored the output of the block's shortcut.
        unusable = memory.shortcut is None or (
            # Reentrant checkpointing first runs without gradients.
            place.features.get(output).requires_grad
            and not memory.shortcut.requires_grad
        )
        identity = memory.shortcut
        if unusable:
            identity = block.get_submodule(place.shortcut)(x)
        memory.identity, memory.shortcut = identity, None
    elif run.version is not None and not place.changes_input:
        if x._version != run.version:
            raise ValueError(
                'writes into its input, but did not when its attention was attached'
            )
    if place.features.layout != 'BCHW':
        identity = memory.identity
        if hasattr(attention, 'identity_norm'):
            identity = attention.identity_norm(identity)
        memory.identity = place.features.to_map(identity, everything, output)[0]


class Tap:
    """Forward hook of a submodule whose output an attention reads or replaces.

    Args:
        attention (LayerAttention): The attention.
        name (str): Name of the submodule in its block.
        method (str): Name of the attention's method for the submodule. The method
            takes the submodule's input and output and the memory, which is None if
            the submodule runs outside of its block. It returns a new output, or None
            to keep the output.
    """

    def __init__(self, attention: LayerAttention, name: str, method: str) -> None:
        self.attention = attention
        self.name = name
        self.method = method

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        attention: Any = self.attention
        memory = None
        for run in _running.runs.values():
            if run.block is not None and _part(run.block, self.name) is module:
                # Use the attention of the copy that is running, such as a replica.
                attention, memory = run.block.layer_attn, run.memory
        if not attention.active:
            return None
        return getattr(attention, self.method)(args[0], output, memory)


def _part(block: nn.Module, name: str) -> Any:
    """A submodule, or a property such as ``norm3``; None if it does not exist."""
    part: Any = block
    for attribute in name.split('.'):
        part = getattr(part, attribute, None)
    return part


def ensure_tap(
    block: nn.Module, name: str, attention: LayerAttention, method: str
) -> Any:
    """Add a tap to a submodule unless it has one; a replaced submodule needs a new tap.

    Args:
        block (nn.Module): The block.
        name (str): Name of the submodule in it, such as ``norm3``.
        attention (LayerAttention): The attention.
        method (str): See :class:`Tap`.

    Returns:
        RemovableHandle | None: Handle that removes the tap; None if there was one.

    Raises:
        RuntimeError: If the block no longer has that submodule.
    """
    module = _part(block, name)
    if module is None:
        raise RuntimeError(
            f'layer attention: block {attention.place.block} has lost its {name}, '
            f'which {type(attention).__name__} needs. Convert the network before you '
            'attach attentions, or leave the block out with blocks=[...]'
        )
    for hook in module._forward_hooks.values():
        if isinstance(hook, Tap) and hook.method == method:
            return None
    return module.register_forward_hook(Tap(attention, name, method))
