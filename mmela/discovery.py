"""Which blocks of a network layer attentions can follow, and how to group them.

One forward pass is watched: what each module gets and returns, which tensors
are computed from which, and where two of one shape are added.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Blocks = Union[str, Sequence[Union[str, Sequence[str]]]]

# What gives a view or a copy: the result is still the same features.
_SAME = {
    *('view', 'reshape', 'flatten', 'unflatten', 'permute', 'transpose', 'clone'),
    *('contiguous', 'squeeze', 'unsqueeze', 'to', 'type', 'type_as', 'float', 'half'),
    *('dropout', 'movedim', 'swapaxes', 'moveaxis', 'view_as', 'reshape_as'),
    *('__getitem__', 'rearrange', 'detach', 'narrow', 'alias', 'T', 'mT'),
}
_ADD = {'add', 'add_', '__add__', '__iadd__', '__radd__', 'addcmul', 'sum'}
_MAX_EXTRA_TOKENS = 16


@dataclass
class Block:
    """A module that a layer attention can follow.

    Attributes:
        name (str): Its name in the network.
        module (nn.Module): The module.
        shape (tuple[int, ...]): Of its output, batch size first.
        layout (str): ``'BCHW'``, ``'BHWC'`` or ``'BLC'`` (tokens).
        channels (int): Channels of its output.
        size (tuple[int, int]): Height and width of its output.
        extra (int): Tokens that precede those of the map. Defaults to 0.
        resolution (Resolution, optional): How to find height and width of
            tokens in a forward pass. Defaults to None.
        same_input (bool): Whether its input has the shape of its output.
            Defaults to True.
        shortcut (nn.Module, optional): What brings its input to the shape of
            its output. Defaults to None.
        residual (bool): Whether it adds what it computes to something.
            Defaults to True.
        follows (bool): Whether its input is computed from the output of the
            block before. Defaults to False.
    """

    name: str
    module: nn.Module
    shape: Tuple[int, ...]
    layout: str
    channels: int
    size: Tuple[int, int]
    extra: int = 0
    resolution: Optional['Resolution'] = None
    same_input: bool = True
    shortcut: Optional[nn.Module] = None
    residual: bool = True
    follows: bool = False


class Resolution:
    """Height and width of the map that tokens are of, found as in a trial.

    Args:
        where (str): ``'output'`` or ``'arguments'`` of the layer, ``'module'``
            or ``'square'``.
        index (int): Which of the pairs of numbers there, or of the maps that
            the module returns. Defaults to 0.
        module (nn.Module, optional): A module that runs before the layer, such
            as the patch embedding. Defaults to None.
        extra (int): Tokens that precede those of the map. Defaults to 0.
    """

    def __init__(
        self,
        where: str,
        index: int = 0,
        module: Optional[nn.Module] = None,
        extra: int = 0,
    ) -> None:
        self.where = where
        self.index = index
        self.extra = extra
        self.module = (module,)  # in a tuple, so that it is nobody's submodule

    def watch(self) -> None:
        """Have the module tell the size of its map in each forward pass."""
        if self.module[0] is not None:
            self.module[0].register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: tuple, output: Any) -> None:
        from .layers.stages import current_pass

        current_pass()[self] = list(_sizes(output))[self.index]

    def __call__(self, args: tuple, output: Any) -> Tuple[int, int]:
        from .layers.stages import current_pass

        if self.where == 'module':
            return current_pass()[self]
        if self.where == 'square':
            out = _first_tensor(output)
            side = round((out.size(1) - self.extra) ** 0.5)
            return side, side
        return list(_pairs(output if self.where == 'output' else args))[self.index]


@dataclass
class _Call:
    """What was seen of one call of a module."""

    index: int
    name: str
    module: nn.Module
    depth: int
    began: int
    parents: Tuple[int, ...]
    shape_in: Optional[Tuple[int, ...]] = None
    args: tuple = ()
    derived_from: int = 0  # bits: the calls that its input was computed from
    shape: Optional[Tuple[int, ...]] = None
    pairs_in: List[tuple] = field(default_factory=list)
    pairs_out: List[tuple] = field(default_factory=list)
    sizes: List[tuple] = field(default_factory=list)
    identity: bool = False  # the output is the input with things added
    sums: set = field(default_factory=set)  # sizes of what it adds by itself
    adds: bool = False  # it returns a sum of what was computed within it
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

    # What is known of a tensor is kept as its attributes: they stay with it
    # where it is changed in place, and go with it.

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, '__name__', '')
        if name in ('__get__', '__set__', 'size', 'dim', 'stride'):
            if not torch.is_tensor(result):
                return result
        inputs = list(tensors_of((args, kwargs or {})))
        if not inputs:
            return result
        self._clock += 1
        seen, same, more = 0, set(), set()
        for tensor in inputs:
            seen |= getattr(tensor, '_mmela_from', 0)
        if name in _ADD:
            same = more = self._note_addition(inputs, result)
        elif name in _SAME or any(result is t for t in inputs):
            same = getattr(inputs[0], '_mmela_same', set())
            more = getattr(inputs[0], '_mmela_more', set())
        for tensor in tensors_of(result):
            if isinstance(tensor, nn.Parameter):
                continue
            tensor._mmela_from = seen | getattr(tensor, '_mmela_from', 0)
            tensor._mmela_same = set(same)
            tensor._mmela_more = set(more)  # of these, to which was added
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
                for tensor in summands:
                    for made in getattr(tensor, '_mmela_made', ()):
                        source = self.calls[made]
                        direct = source.parents[-1:] == (call.index,)
                        if direct and source.args[:1] == call.args[:1]:
                            call.shortcut = made
        return same

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
            x = everything[0] if everything else None
            call.pairs_in = list(_pairs(everything))
            for tensor in tensors_of(everything):
                call.derived_from |= getattr(tensor, '_mmela_from', 0)
            if torch.is_tensor(x):
                call.shape_in = tuple(x.shape)
                call.args = (id(x),)
                x._mmela_same = {*getattr(x, '_mmela_same', ()), call.index}

        return hook

    def _leave(self, module, args, kwargs, output):
        call = self._stack.pop()
        self._clock += 1
        call.ended = self._clock
        call.pairs_out = list(_pairs(output))
        call.sizes = list(_sizes(output))
        out = _first_tensor(output)
        for tensor in tensors_of(output):
            tensor._mmela_from = getattr(tensor, '_mmela_from', 0) | 1 << call.index
            made = getattr(tensor, '_mmela_made', [])
            tensor._mmela_made = [*made, call.index]
        if out is not None:
            call.shape = tuple(out.shape)
            call.adds = out.numel() in call.sums
            call.identity = call.index in getattr(out, '_mmela_more', ())


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)


def _first_tensor(output: Any) -> Optional[Tensor]:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if torch.is_tensor(output) else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pairs(values: Any) -> Iterator[Tuple[int, int]]:
    """Pairs of integers, also those that follow each other."""
    if not isinstance(values, (tuple, list)):
        return
    for first, second in zip(values, values[1:]):
        if _is_int(first) and _is_int(second):
            yield first, second
    for value in values:
        if isinstance(value, (tuple, list)) and len(value) == 2:
            yield from _pairs(value)


def _sizes(output: Any) -> Iterator[Tuple[int, int]]:
    """Sizes of maps in what a module returns, or the sizes that it tells."""
    for value in output if isinstance(output, (tuple, list)) else (output,):
        if torch.is_tensor(value) and value.dim() == 4:
            yield value.shape[2], value.shape[3]
            yield value.shape[1], value.shape[2]
    yield from _pairs(output)


def watch(network: nn.Module, *inputs: Tensor) -> List[_Call]:
    """Run a network once, in eval mode and without gradients, and watch it.

    Args:
        network (nn.Module): The network; left as it was.
        *inputs (Tensor): Its input.

    Returns:
        list: The calls of its modules, in order.
    """
    modes = {module: module.training for module in network.modules()}
    watcher = _Watch(network)
    try:
        for module in modes:
            module.training = False
        with torch.no_grad(), watcher:
            network(*inputs)
    finally:
        watcher.close()
        for module, mode in modes.items():
            module.training = mode
    return watcher.calls


def find_blocks(
    calls: Sequence[_Call], batch: int, size: Tuple[int, int]
) -> List[Block]:
    """The residual blocks of a network.

    Args:
        calls (Sequence): What :func:`watch` returns.
        batch (int): Batch size of the input.
        size (tuple[int, int]): Height and width of the input.

    Returns:
        list[Block]: In the order in which they run.
    """
    times = Counter(call.module for call in calls)
    fitting = {
        call.index
        for call in calls
        if times[call.module] == 1
        and call.name
        and (call.identity or call.adds)
        and describe(calls, call, batch, size) is not None
    }
    inner: Dict[int, List[_Call]] = {}
    for index in sorted(fitting):
        for parent in calls[index].parents:
            inner.setdefault(parent, []).append(calls[index])
    # One that only passes on what blocks within it add is a list of blocks,
    # unless these do not belong together: then it is the block.
    lists = {
        index
        for index in fitting
        if not calls[index].adds
        and len(group(_described(calls, _outermost(inner.get(index, ())), batch, size)))
        == 1
    }
    kinds = {
        type(calls[index].module)
        for index in fitting - lists
        if inner.get(index) and not isinstance(calls[index].module, nn.Sequential)
    }
    # The first of a stage is of their kind, though its input has another shape.
    fitting |= {
        index
        for index in inner
        if type(calls[index].module) in kinds
        and times[calls[index].module] == 1
        and describe(calls, calls[index], batch, size) is not None
    }
    chosen = _outermost(calls[index] for index in sorted(fitting - lists))
    return _described(calls, chosen, batch, size)


def find_plain_blocks(
    calls: Sequence[_Call], batch: int, size: Tuple[int, int]
) -> List[Block]:
    """Blocks of a network without residual connections, such as VGG.

    These are consecutive modules of one kind whose outputs have one width and
    resolution.

    Args:
        calls (Sequence): What :func:`watch` returns.
        batch (int): Batch size of the input.
        size (tuple[int, int]): Height and width of the input.

    Returns:
        list[Block]: In the order in which they run.
    """
    times = Counter(call.module for call in calls)
    siblings: Dict[Tuple[int, ...], List[_Call]] = {}
    for call in calls:
        once = times[call.module] == 1
        if call.name and once and any(True for _ in call.module.parameters()):
            siblings.setdefault(call.parents, []).append(call)
    fitting: List[_Call] = []
    for members in siblings.values():
        for one, other in zip(members, members[1:]):
            pair = [describe(calls, call, batch, size) for call in (one, other)]
            if (
                type(one.module) is type(other.module)
                and None not in pair
                and same_features(*pair)
                and other.derived_from >> one.index & 1
            ):
                fitting += [one, other]
    unique = {call.index: call for call in fitting}
    return _described(calls, _outermost(unique[i] for i in sorted(unique)), batch, size)


def _outermost(calls: Iterable[_Call]) -> List[_Call]:
    """Those of some calls, in order, that are within no other of them."""
    chosen: List[_Call] = []
    for call in calls:
        if not any(other.index in call.parents for other in chosen):
            chosen.append(call)
    return chosen


def _described(calls, chosen, batch, size) -> List[Block]:
    blocks = []
    before: Optional[_Call] = None
    for call in chosen:
        block = describe(calls, call, batch, size)
        block.residual = call.identity or call.adds
        block.follows = before is not None and bool(
            call.derived_from >> before.index & 1
        )
        before = call
        blocks.append(block)
    return blocks


def describe(
    calls: Sequence[_Call], call: _Call, batch: int, size: Tuple[int, int]
) -> Optional[Block]:
    """What a module returns, as features.

    Args:
        calls (Sequence): What :func:`watch` returns.
        call (_Call): One of them.
        batch (int): Batch size of the input.
        size (tuple[int, int]): Height and width of the input.

    Returns:
        Block | None: None if it is no map and no tokens.
    """
    shape = call.shape
    if shape is None or call.shape_in is None or shape[0] != batch:
        return None
    same = call.shape_in == shape
    shortcut = None
    if not same and call.shortcut is not None:
        shortcut = calls[call.shortcut].module
    common = dict(same_input=same, shortcut=shortcut)
    if len(shape) == 4:
        first = _stretch(shape[2:], size)
        last = _stretch(shape[1:3], size)
        if min(first, last) > 0.8 or min(shape[1:]) < 1:
            return None
        if first <= last:
            return Block(
                call.name, call.module, shape, 'BCHW', shape[1], shape[2:], **common
            )
        return Block(
            call.name, call.module, shape, 'BHWC', shape[3], shape[1:3], **common
        )
    if len(shape) != 3 or shape[1] < 2:
        return None
    found = _find_resolution(calls, call, shape[1], size)
    if found is None:
        return None
    resolution, hw = found
    return Block(
        call.name,
        call.module,
        shape,
        'BLC',
        shape[2],
        hw,
        resolution.extra,
        resolution,
        **common,
    )


def _stretch(shape: Sequence[int], size: Tuple[int, int]) -> float:
    """How far height and width are from one and the same share of the input."""
    ratio = shape[0] * size[1] / (shape[1] * size[0])
    return max(ratio, 1 / ratio) - 1


def _find_resolution(calls, call, length, size):
    """Where height and width of the tokens that a layer returns can be read."""
    best = None
    sources = [('output', call.pairs_out, None), ('arguments', call.pairs_in, None)]
    for before in reversed(calls[: call.index]):
        if before.ended and before.ended < call.began and before.sizes:
            sources.append(('module', before.sizes, before.module))
    for where, pairs, module in sources:
        for index, (height, width) in enumerate(pairs):
            if height < 1 or width < 1 or _stretch((height, width), size) > 0.8:
                continue
            extra = length - height * width
            if not 0 <= extra <= _MAX_EXTRA_TOKENS or extra > length // 2:
                continue
            if best is None or extra < best[0].extra:
                found = Resolution(where, index, module, extra)
                best = found, (height, width)
    if best is None:
        for extra in range(min(_MAX_EXTRA_TOKENS, length // 2)):
            side = round((length - extra) ** 0.5)
            if side > 1 and side * side == length - extra:
                return Resolution('square', extra=extra), (side, side)
    return best


def group(blocks: Sequence[Block]) -> List[List[Block]]:
    """Put consecutive blocks of one width and resolution into stages.

    Args:
        blocks (Sequence[Block]): Blocks in the order in which they run.

    Returns:
        list[list[Block]]: The stages.
    """
    stages: List[List[Block]] = []
    for block in blocks:
        fits = stages and block.follows and same_features(stages[-1][-1], block)
        if fits:
            stages[-1].append(block)
        else:
            stages.append([block])
    return stages


def same_features(one: Block, other: Block) -> bool:
    """Whether the outputs of two blocks can be attended over together."""
    return (one.layout, one.shape, one.extra) == (
        other.layout,
        other.shape,
        other.extra,
    )


def name_matches(pattern: str, name: str) -> bool:
    """Whether a pattern with ``*`` for any part of one name is that of a module.

    Args:
        pattern (str): Such as ``'layers.*'`` or ``'stages.*.blocks.*'``.
        name (str): A module's name.

    Returns:
        bool: True if it is; ``*`` matches no dot.
    """
    parts = map(re.escape, pattern.split('*'))
    return re.fullmatch('[^.]*'.join(parts), name) is not None


def name_blocks(
    calls: Sequence[_Call],
    patterns: Sequence[str],
    batch: int,
    size: Tuple[int, int],
) -> List[Block]:
    """The blocks of given names, in the order in which they run.

    Args:
        calls (Sequence): What :func:`watch` returns.
        patterns (Sequence[str]): Names or patterns of names.
        batch (int): Batch size of the input.
        size (tuple[int, int]): Height and width of the input.

    Returns:
        list[Block]: The blocks.

    Raises:
        ValueError: If a name is of no module that runs once and returns
            features.
    """
    times = Counter(call.module for call in calls)
    chosen = []
    for pattern in patterns:
        matching = [c for c in calls if c.name and name_matches(pattern, c.name)]
        if not matching:
            seen = [c.name for c in calls if c.depth in (1, 2)]
            raise ValueError(
                f'blocks: no module {pattern!r} runs in the backbone; there are '
                f'{", ".join(dict.fromkeys(seen))} and what is in them'
            )
        for call in matching:
            if times[call.module] > 1:
                raise ValueError(
                    f'blocks: {call.name} runs more than once in a forward pass'
                )
            if describe(calls, call, batch, size) is None:
                raise ValueError(
                    f'blocks: {call.name} takes {call.shape_in} and returns '
                    f'{call.shape}, which are no features: maps (B, C, H, W) or '
                    '(B, H, W, C), or tokens (B, L, C)'
                )
        chosen += matching
    by_index = {call.index: call for call in chosen}
    return _described(calls, [by_index[i] for i in sorted(by_index)], batch, size)
