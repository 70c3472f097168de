"""A stage: consecutive blocks whose attentions share a memory.

An attention is the submodule ``layer_attn`` of its block and runs from the block's
own hooks, :func:`before_block` and :func:`after_block`. They act on the module that
they are called with, so copies and replicas of a network run on their own. What a
forward pass needs is kept by thread and not in modules; a hook of the network,
:class:`PassHook`, drops it when the pass ends, however it ends.
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
    """What the attentions of one stage have in common, without any module.

    Args:
        blocks (Sequence[str]): Names of all blocks of the stage in the network, in
            the order in which they run, those without an attention too.
        number (int): Its index among the stages of the network. Defaults to 0.

    Attributes:
        before (Stage, optional): The stage whose memory this one starts with.
        size (int): Number of attentions.
        reached (list[bool]): For each attention, whether a forward pass has come to
            it; replicas of a network note it here too.
        hands_over (bool): Whether another stage starts with its memory.
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
        """Have ``size`` attentions."""
        self.size = size
        self.reached = [False] * size

    def __getstate__(self) -> dict:
        return {**vars(self), 'observer': None}  # a copy is not measured


@dataclass(frozen=True)
class Place:
    """Where an attention is in its network: plain values, equal in all copies.

    Attributes:
        stage (Stage): Its stage.
        block (str): Name of its block in the network.
        index (int): Number of the attentions of the stage before it.
        features (Features): Where the features are in the block's output.
        inputs (tuple): Path to the features in the block's positional arguments.
        shortcut (str, optional): Name, in the block, of the module that brings the
            input to the shape of the output. Defaults to None: it has that shape.
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
    """A stage in the course of one forward pass."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory  # a StageMemory of the attentions' own kind
        self.done = 0  # blocks with an attention that have run
        self.block: Optional[nn.Module] = None  # the one that is running
        self.version: Optional[int] = None  # of its input


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
    """Keyword arguments of a network that is running.

    Only the frame of its call holds them. So they go, and with them what the pass
    has kept, as soon as the call ends in whatever way, Ctrl-C included, after which
    no hook is called.
    """

    stages: Sequence[Stage] = ()
    number = -1

    def __del__(self) -> None:
        for stage in self.stages:
            # A traceback may keep the frame alive until after the next pass began
            if _running.passes.get(stage) == self.number:
                del _running.passes[stage]
                _running.drop(stage)


class PassHook:
    """Forward pre-hook of a network: a pass takes over nothing from an earlier one.

    To be registered with ``with_kwargs=True``.

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
        held = _Arguments(kwargs)
        held.stages, held.number = self.stages, next(_pass_numbers)
        for stage in self.stages:
            _running.drop(stage)
            _running.passes[stage] = held.number
        return args, held


def attach_hooks(block: nn.Module) -> List[Any]:
    """Have a block run its ``layer_attn``.

    Args:
        block (nn.Module): The block.

    Returns:
        list: Handles that remove the hooks.
    """
    return [
        block.register_forward_pre_hook(before_block, with_kwargs=True),
        # First of all: other hooks see the output with the attention.
        block.register_forward_hook(after_block, with_kwargs=True, prepend=True),
    ]


def before_block(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a block: have the memory of its stage at hand.

    Args:
        block (nn.Module): The block, with its attention as ``layer_attn``.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.

    Raises:
        RuntimeError: If an earlier block of the stage has not run in this pass.
    """
    attention: Any = block.layer_attn
    place: Place = attention.place
    run = _start(attention, args) if place.index == 0 else _current(place)
    _running.runs[place.stage] = run
    run.block = block
    if attention.needs_identity:
        x = _input(place, (*args, *kwargs.values()))
        run.memory.identity = x.clone() if place.changes_input else x
        run.version = None if is_compiling() or x.is_inference() else x._version
    if not is_compiling():
        for name, method in attention.taps.items():
            ensure_tap(block, name, attention, method)


def after_block(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of a block: run its attention as far as it is not pruned.

    Args:
        block (nn.Module): The block.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.
        output (Any): Its output.

    Returns:
        Any: The output with what the attention retrieves.

    Raises:
        RuntimeError: If the output is not of the form that it had when the
            attention was attached; it names the block.
    """
    attention: Any = block.layer_attn
    place: Place = attention.place
    stage = place.stage
    run = _running.runs.get(stage)
    if run is None or run.block is not block:
        raise RuntimeError(f'layer attention: block {place.block} runs within itself')
    # Nothing is left where an error ends the pass here.
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
            f'layer attention: block {place.block} {error}; leave it out by '
            'blocks=[...]'
        ) from error
    if run.done < stage.size:
        _running.runs[stage] = run
    else:
        _finish(stage, run.memory)
    return output if new is x else place.features.put(output, new)


def _start(attention: LayerAttention, args: tuple) -> _Run:
    """Begin a stage; what an interrupted pass may have left is gone."""
    stage = attention.place.stage
    memory: Any = attention.Memory()
    memory.first = attention
    if stage.before is not None:
        memory.before = _taken_over(stage.before, args)
    return _Run(memory)


def _current(place: Place) -> _Run:
    """The run of the pass that a block is part of."""
    run = _running.runs.get(place.stage)
    if run is None or run.block is not None or run.done != place.index:
        _running.runs.pop(place.stage, None)
        raise RuntimeError(
            f'layer attention: block {place.block} runs in a pass in which the blocks '
            f'of its stage before it ({", ".join(place.stage.blocks)}) have not all '
            'run. Blocks that are skipped at random, that run alone, or that '
            'activation checkpointing runs again from outside (use with_cp=True, '
            'which does so within the block) cannot have one; leave them out by '
            'blocks=[...]'
        )
    return run


def _taken_over(before: Stage, args: tuple) -> StageMemory:
    """Memory that the stage before has ended with."""
    memory = _running.handed_over.pop(before, None)
    found = (
        [] if memory is None else list(filter(torch.is_tensor, vars(memory).values()))
    )
    lost = found and not any(t.requires_grad for t in found)
    needs = any(t.requires_grad for _, t in tensors(args))
    if memory is None or needs and lost:
        raise RuntimeError(
            'layer attention: a stage takes over the memory of the stage before '
            f'({", ".join(before.blocks)}), which '
            f'{"is not there" if memory is None else "has no gradient"}. That is so '
            'where activation checkpointing runs whole stages: use with_cp=True, '
            'which checkpoints blocks, or cross_stage=False.'
        )
    return memory


def _finish(stage: Stage, memory: StageMemory) -> None:
    """Pass on what a forward pass has left in its memory."""
    if stage.observer is not None:
        stage.observer([scores.detach() for scores in memory.scores])
    if stage.hands_over:
        memory.first = None
        _running.handed_over[stage] = memory


# -- what an attention sees within its block -----------------------------------


def _input(place: Place, everything: tuple) -> Tensor:
    """The features that a block gets."""
    found: Any = everything
    for key in place.inputs:
        found = found[key]
    return found


def _complete_identity(
    block: nn.Module, run: _Run, everything: tuple, output: Any
) -> None:
    """Have in the memory, as a map, the identity that a block has added."""
    attention: Any = block.layer_attn
    place, memory = attention.place, run.memory
    x = _input(place, everything)
    if place.shortcut is not None:
        # A tap has kept what the block's own shortcut returned.
        lost = memory.shortcut is None or (
            # Reentrant checkpointing computes without gradients at first.
            place.features.get(output).requires_grad
            and not memory.shortcut.requires_grad
        )
        identity = memory.shortcut
        if lost:
            identity = block.get_submodule(place.shortcut)(x)
        memory.identity, memory.shortcut = identity, None
    elif run.version is not None and not place.changes_input:
        if x._version != run.version:
            raise ValueError('writes into its input, which it did not in the trial')
    if place.features.layout != 'BCHW':
        identity = memory.identity
        if hasattr(attention, 'identity_norm'):
            identity = attention.identity_norm(identity)
        memory.identity = place.features.to_map(identity, everything, output)[0]


class Tap:
    """Forward hook of a submodule that an attention reaches into.

    Args:
        attention (LayerAttention): The attention.
        name (str): Name of the submodule in its block.
        method (str): Name of the attention's method for the submodule. That gets
            the submodule's input, its output and the memory, or None for the memory
            where the submodule runs without its block, and returns what takes the
            place of the output, or None.
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
                # The attention of the copy that runs, such as a replica
                attention, memory = run.block.layer_attn, run.memory
        if not attention.active:
            return None
        return getattr(attention, self.method)(args[0], output, memory)


def _part(block: nn.Module, name: str) -> Any:
    """A submodule, also by a property such as ``norm3``; None if there is none."""
    part: Any = block
    for attribute in name.split('.'):
        part = getattr(part, attribute, None)
    return part


def ensure_tap(
    block: nn.Module, name: str, attention: LayerAttention, method: str
) -> Any:
    """Have a submodule call an attention, also one that took another's place.

    Args:
        block (nn.Module): The block.
        name (str): Name of the submodule in it, such as ``norm3``.
        attention (LayerAttention): The attention.
        method (str): See :class:`Tap`.

    Returns:
        RemovableHandle | None: To remove it; None if it was there.

    Raises:
        RuntimeError: If the block has no such submodule any more.
    """
    module = _part(block, name)
    if module is None:
        raise RuntimeError(
            f'layer attention: block {attention.place.block} has lost its {name}, '
            f'which {type(attention).__name__} needs; convert the network before you '
            'give it attentions, or leave the block out by blocks=[...]'
        )
    for hook in module._forward_hooks.values():
        if isinstance(hook, Tap) and hook.method == method:
            return None
    return module.register_forward_hook(Tap(attention, name, method))
