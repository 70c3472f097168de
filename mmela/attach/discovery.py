"""Find the blocks of a network that layer attentions can follow, and group them.

It watches one forward pass: what each module takes and returns, which tensors
come from which, and where two tensors of one shape are added.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..arguments import did_you_mean
from ..layers.features import (
    Features,
    Path,
    Resolution,
    Size,
    count_alike,
    pairs,
    sizes,
    tensors,
)
from .blocks import Block, same_features

Blocks = Union[str, Sequence[Union[str, Sequence[str]]]]

# Functions that return a view or a copy: the features are still the same.
_SAME = {
    *('view', 'reshape', 'flatten', 'unflatten', 'permute', 'transpose', 'clone'),
    *('contiguous', 'squeeze', 'unsqueeze', 'to', 'type', 'type_as', 'float', 'half'),
    *('dropout', 'movedim', 'swapaxes', 'moveaxis', 'view_as', 'reshape_as'),
    *('__getitem__', 'rearrange', 'detach', 'narrow', 'alias', 'T', 'mT'),
}
_ADD = {'add', 'add_', '__add__', '__iadd__', '__radd__', 'addcmul', 'sum'}
_MAX_EXTRA_TOKENS = 16
# A map may differ this much in aspect ratio from the input.
_MOST_STRETCH = 0.8
# Two layouts whose stretch differs by less than this are ambiguous.
_TIE = 0.15


@dataclass
class _Call:
    """One observed call of a module."""

    index: int
    name: str
    module: nn.Module
    depth: int
    began: int
    parents: Tuple[int, ...]
    in_path: Path = (0,)
    shape_in: Optional[Tuple[int, ...]] = None
    changes_input: bool = False
    path: Path = ()  # to the features in the output
    alone: bool = True  # the output has no other features
    args: tuple = ()
    version: int = 0
    derived_from: int = 0  # bit mask of the calls that its input depends on
    shape: Optional[Tuple[int, ...]] = None
    pairs_in: List[tuple] = field(default_factory=list)
    pairs_out: List[tuple] = field(default_factory=list)
    sizes: List[tuple] = field(default_factory=list)
    identity: bool = False  # the output is the input plus something
    sums: set = field(default_factory=set)  # sizes of the sums computed in it
    adds: bool = False  # it returns a sum of tensors computed within it
    shortcut: Optional[int] = None  # the call that made one of the summands
    ended: int = 0


class _Watch(TorchFunctionMode):
    """Watches a forward pass, function by function and module by module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.calls: List[_Call] = []
        self._stack: List[_Call] = []
        self._clock = 0
        self._network = network
        names = {module: name for name, module in network.named_modules()}
        self._handles = []
        for module, name in names.items():
            self._handles += [
                module.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                module.register_forward_hook(self._leave, with_kwargs=True),
            ]

    def close(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        for tensor in (*self._network.parameters(), *self._network.buffers()):
            for name in [n for n in vars(tensor) if n.startswith('_mmela_')]:
                delattr(tensor, name)

    # Facts about a tensor are attributes of the tensor: they survive changes in
    # place, and are freed with it.

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, '__name__', '')
        if name in ('__get__', '__set__', 'size', 'dim', 'stride'):
            if not torch.is_tensor(result):
                return result
        inputs = list(_tensors((args, kwargs or {})))
        if not inputs:
            return result
        self._clock += 1
        sources, same, more = 0, set(), set()
        for tensor in inputs:
            sources |= getattr(tensor, '_mmela_from', 0)
        if name in _ADD:
            same = more = self._note_addition(inputs, result)
        elif name in _SAME or any(result is t for t in inputs):
            same = getattr(inputs[0], '_mmela_same', set())
            more = getattr(inputs[0], '_mmela_more', set())
        for tensor in _tensors(result):
            if isinstance(tensor, nn.Parameter):
                continue
            tensor._mmela_from = sources | getattr(tensor, '_mmela_from', 0)
            tensor._mmela_same = set(same)
            tensor._mmela_more = set(more)  # those that were added to
            if not any(tensor is t for t in inputs):
                tensor._mmela_born = self._clock
                if name in _SAME:
                    tensor._mmela_born = getattr(inputs[0], '_mmela_born', 0)
                    tensor._mmela_made = getattr(inputs[0], '_mmela_made', [])
        return result

    def _note_addition(self, inputs: List[Tensor], result: Any) -> set:
        summands = [t for t in inputs if not isinstance(t, nn.Parameter)]
        if not torch.is_tensor(result) or len(summands) < 2:
            return set()
        summands = [t for t in summands if t.shape == result.shape]
        if len(summands) < 2 or result.dim() < 3:
            return set()
        same = set().union(*(getattr(t, '_mmela_same', set()) for t in summands))
        if self._stack:
            call = self._stack[-1]
            within = [
                call.index in getattr(t, '_mmela_same', ())
                or getattr(t, '_mmela_born', 0) > call.began
                for t in summands
            ]
            if all(within):
                call.sums.add(result.numel())
                self._note_shortcut(call, summands)
        return same

    def _note_shortcut(self, call: _Call, summands: List[Tensor]) -> None:
        """Note a child call that computes a summand straight from the block's input."""
        for tensor in summands:
            for made in getattr(tensor, '_mmela_made', ()):
                source = self.calls[made]
                direct = source.parents[-1:] == (call.index,)
                if direct and source.args[:1] == call.args[:1]:
                    call.shortcut = made

    def _enter(self, name: str):
        def hook(module, args, kwargs):
            self._clock += 1
            call = _Call(
                len(self.calls),
                name,
                module,
                len(self._stack),
                self._clock,
                tuple(c.index for c in self._stack),
            )
            self.calls.append(call)
            self._stack.append(call)
            everything = (*args, *kwargs.values())
            call.pairs_in = list(pairs(everything))
            for tensor in _tensors(everything):
                call.derived_from |= getattr(tensor, '_mmela_from', 0)
            first = _first_argument(everything)
            if first is not None:
                call.in_path, x = first
                call.shape_in = tuple(x.shape)
                call.args = (id(x),)
                call.version = x._version
                x._mmela_same = {*getattr(x, '_mmela_same', ()), call.index}

        return hook

    def _leave(self, module, args, kwargs, output):
        call = self._stack.pop()
        self._clock += 1
        call.ended = self._clock
        call.pairs_out = list(pairs(output))
        call.sizes = list(sizes(output))
        for tensor in _tensors(output):
            tensor._mmela_from = getattr(tensor, '_mmela_from', 0) | 1 << call.index
            made = getattr(tensor, '_mmela_made', [])
            tensor._mmela_made = [*made, call.index]
        x = _first_argument((*args, *kwargs.values()))
        call.changes_input = x is not None and x[1]._version != call.version
        first = _first(output)
        if first is not None:
            call.path, out = first
            call.shape = tuple(out.shape)
            call.alone = not call.path or count_alike(output, out) == 1
            call.adds = out.numel() in call.sums
            call.identity = call.index in getattr(out, '_mmela_more', ())


def _tensors(value: Any) -> Iterable[Tensor]:
    return (tensor for _, tensor in tensors(value))


def _first(value: Any) -> Optional[Tuple[Path, Tensor]]:
    """The first tensor and its path; None for a list of several, all of equal rank."""
    paths = list(tensors(value))
    if not paths or isinstance(value, list) and len(paths) > 1:
        return None
    return paths[0]


def _first_argument(arguments: tuple) -> Optional[Tuple[Path, Tensor]]:
    """The first tensor, and its path, in the first argument that has any."""
    for index, value in enumerate(arguments):
        if any(True for _ in tensors(value)):
            first = _first(value)
            return first and ((index, *first[0]), first[1])
    return None


def watch(
    network: nn.Module, *inputs: Any, outputs: Optional[List[Tensor]] = None
) -> List[_Call]:
    """Run a network once, in eval mode and without gradients, and watch it.

    Args:
        network (nn.Module): The network, which is restored afterwards.
        *inputs (Tensor | None): Its input.
        outputs (list, optional): The tensors that it returns are added here.
            Defaults to None.

    Returns:
        list: The calls of its modules, in order.
    """
    modes = {module: module.training for module in network.modules()}
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    watcher = _Watch(network)
    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices=[]), torch.no_grad(), watcher:
            result = network(*inputs)
        if outputs is not None:
            outputs += [tensor.detach() for tensor in _tensors(result)]
    finally:
        watcher.close()
        for module, mode in modes.items():
            module.training = mode
        for module, name, buffer, version, value in buffers:
            module._buffers[name] = buffer
            if buffer._version != version:
                buffer.copy_(value)
    return watcher.calls


@dataclass
class Trial:
    """A watched forward pass.

    Attributes:
        calls (list): What :func:`watch` returned.
        batch (int): Batch size of the input.
        size (tuple[int, int]): Height and width of the input.
        layouts (dict[str, str]): Layouts of maps that a second size has settled,
            by module name. Defaults to none.
        tied (set[str]): Modules whose layout is ambiguous at this size.
    """

    calls: List[_Call]
    batch: int
    size: Size
    layouts: Dict[str, str] = field(default_factory=dict)
    tied: Set[str] = field(default_factory=set)

    def settle(self, other: 'Trial') -> None:
        """Settle layouts by a trial of another size: only channels stay constant."""
        shapes = {call.name: call.shape for call in other.calls}
        for call in self.calls:
            one, two = call.shape, shapes.get(call.name)
            if call.name in self.tied and one and two and len(two) == 4:
                first, last = one[1] == two[1], one[3] == two[3]
                if first != last:
                    self.layouts[call.name] = 'BCHW' if first else 'BHWC'
        self.tied -= set(self.layouts)


def find_blocks(trial: Trial) -> List[Block]:
    """Find the residual blocks of a network.

    Args:
        trial (Trial): A watched forward pass.

    Returns:
        list[Block]: The blocks, in the order in which they run.
    """
    calls = trial.calls
    times = Counter(call.module for call in calls)
    fitting = {
        call.index
        for call in calls
        if times[call.module] == 1
        and call.name
        and (call.identity or call.adds)
        and describe(trial, call) is not None
    }
    inner: Dict[int, List[_Call]] = {}
    for index in sorted(fitting):
        for parent in calls[index].parents:
            inner.setdefault(parent, []).append(calls[index])
    # A module that adds nothing itself is a list of blocks if the blocks within it
    # form one stage; otherwise it is the block.
    lists = {
        index
        for index in fitting
        if not calls[index].adds
        and len(group(_described(trial, _outermost(inner.get(index, ()))))) == 1
    }
    kinds = {
        type(calls[index].module)
        for index in fitting - lists
        if inner.get(index) and not isinstance(calls[index].module, nn.Sequential)
    }
    # The first block of a stage has the same class, but its input another shape.
    fitting |= {
        index
        for index in inner
        if type(calls[index].module) in kinds
        and times[calls[index].module] == 1
        and describe(trial, calls[index]) is not None
    }
    chosen = _outermost(calls[index] for index in sorted(fitting - lists))
    return _described(trial, chosen)


def find_plain_blocks(trial: Trial) -> List[Block]:
    """Find the blocks of a network without residual connections, such as VGG.

    These are consecutive modules of one class whose outputs have the same width
    and resolution.

    Args:
        trial (Trial): A watched forward pass.

    Returns:
        list[Block]: The blocks, in the order in which they run.
    """
    times = Counter(call.module for call in trial.calls)
    siblings: Dict[Tuple[int, ...], List[_Call]] = {}
    for call in trial.calls:
        once = times[call.module] == 1
        if call.name and once and any(True for _ in call.module.parameters()):
            siblings.setdefault(call.parents, []).append(call)
    fitting: Dict[int, _Call] = {}
    for members in siblings.values():
        for one, other in zip(members, members[1:]):
            first, second = describe(trial, one), describe(trial, other)
            if (
                type(one.module) is type(other.module)
                and first is not None
                and second is not None
                and same_features(first, second)
                and other.derived_from >> one.index & 1
            ):
                fitting.update({one.index: one, other.index: other})
    return _described(trial, _outermost(fitting[i] for i in sorted(fitting)))


def _outermost(calls: Iterable[_Call]) -> List[_Call]:
    """Drop calls that run within another one of the given calls; keep the order."""
    chosen: List[_Call] = []
    for call in calls:
        if not any(other.index in call.parents for other in chosen):
            chosen.append(call)
    return chosen


def _described(trial: Trial, chosen: Iterable[_Call]) -> List[Block]:
    blocks: List[Block] = []
    before: Optional[_Call] = None
    for call in chosen:
        block = describe(trial, call)
        assert block is not None and block.size is not None
        block.follows = before is not None and bool(
            call.derived_from >> before.index & 1
        )
        if blocks and block.follows and blocks[-1].size is not None:
            sides = zip(blocks[-1].size, block.size)
            ratio = max(1, round(blocks[-1].size[0] / block.size[0]))
            # 0 means no stride: pooling or padding gave another size
            exact = all(-(-large // ratio) == small for large, small in sides)
            block.stride = ratio if exact else 0
        before = call
        blocks.append(block)
    return blocks


def describe(trial: Trial, call: _Call) -> Optional[Block]:
    """Describe a module as a block by the features that it returns.

    Args:
        trial (Trial): A watched forward pass.
        call (_Call): A call of the module in it.

    Returns:
        Block | None: None unless the module returns exactly one map or one tensor
        of tokens.
    """
    shape = call.shape
    if shape is None or call.shape_in is None or shape[0] != trial.batch:
        return None
    if not call.alone:
        return None
    if len(shape) == 4:
        layout = _layout(trial, call, shape)
        if layout is None:
            return None
        size = shape[2:] if layout == 'BCHW' else shape[1:3]
        channels = shape[1] if layout == 'BCHW' else shape[3]
        features = Features(layout, call.path)
        source = None
    elif len(shape) == 3 and shape[1] > 1:
        of_tokens = _find_resolution(trial, call, shape[1])
        if of_tokens is None:
            return None
        resolution, extra, size, source = of_tokens
        channels = shape[2]
        features = Features('BLC', call.path, extra, resolution)
    else:
        return None
    block = Block(call.name, call.module, channels, features, call.in_path)
    block.shape, block.size = shape, (size[0], size[1])
    block.tells_size = source
    block.changes_input = call.changes_input
    block.same_input = call.shape_in == shape
    if not block.same_input and call.shortcut is not None:
        block.shortcut = trial.calls[call.shortcut].name[len(call.name) + 1 :]
    return block


def _layout(trial: Trial, call: _Call, shape: Tuple[int, ...]) -> Optional[str]:
    """Layout of a tensor; None if it is no map. ``trial.tied`` gets ambiguous ones."""
    if call.name in trial.layouts:
        return trial.layouts[call.name]
    first = _stretch(shape[2:], trial.size)
    last = _stretch(shape[1:3], trial.size)
    if min(first, last) > _MOST_STRETCH or min(shape[1:]) < 1:
        return None
    if abs(first - last) < _TIE:
        trial.tied.add(call.name)
    return 'BCHW' if first <= last else 'BHWC'


def _stretch(shape: Sequence[int], size: Size) -> float:
    """How far the aspect ratio is from that of the input; 0 if they agree."""
    ratio = shape[0] * size[1] / (shape[1] * size[0])
    return max(ratio, 1 / ratio) - 1


def _find_resolution(
    trial: Trial, call: _Call, length: int
) -> Optional[Tuple[Resolution, int, Size, Optional[nn.Module]]]:
    """Find where to read the height and width of the tokens that a layer returns."""
    best: Optional[Tuple[Resolution, int, Size, Optional[nn.Module]]] = None
    sources: List[tuple] = [
        ('output', call.pairs_out, None),
        ('arguments', call.pairs_in, None),
    ]
    for before in reversed(trial.calls[: call.index]):
        if before.ended and before.ended < call.began and before.sizes:
            sources.append(('module', before.sizes, before.module))
    for where, candidates, module in sources:
        for index, (height, width) in enumerate(candidates):
            if min(height, width) < 1:
                continue
            if _stretch((height, width), trial.size) > _MOST_STRETCH:
                continue
            extra = length - height * width
            if not 0 <= extra <= _MAX_EXTRA_TOKENS or extra > length // 2:
                continue
            if best is None or extra < best[1]:
                best = Resolution(where, index), extra, (height, width), module
    if best is None and trial.size[0] == trial.size[1]:
        # No module names the size: only images of this size will work.
        for extra in range(min(_MAX_EXTRA_TOKENS, length // 2)):
            side = round((length - extra) ** 0.5)
            if side > 1 and side * side == length - extra:
                resolution = Resolution('square', length=length - extra)
                return resolution, extra, (side, side), None
    return best


def group(blocks: Sequence[Block]) -> List[List[Block]]:
    """Group consecutive blocks of one width and resolution into stages.

    Args:
        blocks (Sequence[Block]): Blocks in the order in which they run.

    Returns:
        list[list[Block]]: The stages.
    """
    stages: List[List[Block]] = []
    for block in blocks:
        if stages and block.follows and same_features(stages[-1][-1], block):
            stages[-1].append(block)
        else:
            stages.append([block])
    return stages


def name_matches(pattern: str, name: str) -> bool:
    """Whether a module's name matches a pattern.

    Args:
        pattern (str): A name, or a pattern such as ``'stages.*.blocks.*'``;
            ``*`` matches any text without a dot.
        name (str): The name of a module.

    Returns:
        bool: True if it matches.
    """
    parts = map(re.escape, pattern.split('*'))
    return re.fullmatch('[^.]*'.join(parts), name) is not None


def name_blocks(trial: Trial, patterns: Sequence[str]) -> List[Block]:
    """Find blocks by name.

    Args:
        trial (Trial): A watched forward pass.
        patterns (Sequence[str]): Names or patterns of names.

    Returns:
        list[Block]: The blocks, in the order in which they run.

    Raises:
        ValueError: If a name matches no module, or one that runs more than once
            or returns no features.
    """
    calls = trial.calls
    times = Counter(call.module for call in calls)
    chosen: Dict[int, _Call] = {}
    for pattern in patterns:
        matching = [c for c in calls if c.name and name_matches(pattern, c.name)]
        if not matching:
            seen = dict.fromkeys(c.name for c in calls if c.depth in (1, 2))
            raise ValueError(
                f'blocks: no module {pattern!r} runs in the backbone'
                f'{did_you_mean(pattern, [c.name for c in calls])}; choose from '
                f'{", ".join(seen)} and their submodules'
            )
        for call in matching:
            if times[call.module] > 1:
                raise ValueError(
                    f'blocks: {call.name} runs more than once in a forward pass'
                )
            if describe(trial, call) is None:
                raise ValueError(
                    f'blocks: {call.name} takes {call.shape_in} and returns '
                    f'{call.shape}; it must return one map (B, C, H, W) or '
                    '(B, H, W, C), or tokens (B, L, C) of a map of known size'
                )
            chosen[call.index] = call
    return _described(trial, [chosen[index] for index in sorted(chosen)])
