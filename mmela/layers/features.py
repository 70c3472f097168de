"""Locate the features in the output of a block, and convert their layout."""

import copy
import threading
import uuid
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch import Tensor, nn

Size = Tuple[int, int]
Path = Tuple[Any, ...]


@dataclass(frozen=True)
class Features:
    """How to read and replace the features in the output of a block.

    Attributes:
        layout (str): ``'BCHW'`` or ``'BHWC'`` for maps, ``'BLC'`` for tokens.
            Defaults to ``'BCHW'``.
        path (tuple): Indices and keys of the features in nested tuples, lists and
            dicts; empty if the output itself is the features. Defaults to ().
        extra (int): Tokens that precede those of the map, such as a class token.
            Defaults to 0.
        resolution (Resolution, optional): For tokens, the source of the height and
            width of their map. Defaults to None.
    """

    layout: str = 'BCHW'
    path: Path = ()
    extra: int = 0
    resolution: Optional['Resolution'] = None

    def get(self, output: Any) -> Tensor:
        """The features in the output of a block.

        Args:
            output (Any): What the block returned.

        Returns:
            Tensor: The features.

        Raises:
            ValueError: If the output does not have the form that it had when the
                attention was attached, or has several features.
        """
        features = output
        try:
            for key in self.path:
                features = features[key]
        except (LookupError, TypeError):
            features = None
        if not torch.is_tensor(features):
            raise ValueError(
                f'returned {_describe(output)}; when its attention was attached, its '
                f'features were at {_where(self.path)}'
            )
        if self.path and count_alike(output, features) > 1:
            raise ValueError(
                f'returned {_describe(output)}; it has several features, and attention '
                'would change only the first'
            )
        return features

    def put(self, output: Any, features: Tensor) -> Any:
        """Replace the features in the output of a block.

        Args:
            output (Any): What the block returned; it is not changed.
            features (Tensor): The new features.

        Returns:
            Any: An output of the same type.
        """
        return _replaced(output, self.path, features)

    def to_map(
        self, features: Tensor, args: tuple, output: Any
    ) -> Tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Convert the features to a map.

        Args:
            features (Tensor): (B, C, H, W), (B, H, W, C) or (B, L, C).
            args (tuple): Arguments of the block.
            output (Any): Output of the block.

        Returns:
            tuple[Tensor, callable]: The map, (B, C, H, W), without the extra tokens,
            and a function that converts a map back to the layout of the features,
            with the extra tokens unchanged.

        Raises:
            ValueError: If the size of the map is unknown or does not match the
                number of tokens.
        """
        if self.layout == 'BCHW':
            return features, lambda x: x
        if self.layout == 'BHWC':
            return features.permute(0, 3, 1, 2), lambda x: x.permute(0, 2, 3, 1)
        assert self.resolution is not None
        height, width = self.resolution(args, output, features.shape[1] - self.extra)
        patches = features[:, self.extra :].transpose(1, 2)
        extra = features[:, : self.extra]

        def restore(x: Tensor) -> Tensor:
            return torch.cat([extra, x.flatten(2).transpose(1, 2)], dim=1)

        return patches.unflatten(2, (height, width)), restore

    def to_positions(
        self, features: Tensor
    ) -> Tuple[Tensor, Callable[[Tensor], Tensor]]:
        """View features as a map, for operations that treat all positions alike.

        Args:
            features (Tensor): (B, C, H, W), (B, H, W, C) or (B, L, C).

        Returns:
            tuple[Tensor, callable]: A view (B, C, H, W), or (B, C, L, 1) of tokens
            including extra tokens, and a function from such a map back to the layout
            of the features.
        """
        if self.layout == 'BLC':
            return features.transpose(1, 2)[..., None], lambda x: x[..., 0].transpose(
                1, 2
            )
        return self.to_map(features, (), None)


class Resolution:
    """Source of the height and width of the map behind tokens.

    Args:
        where (str): ``'output'`` or ``'arguments'`` of the block; ``'module'``, an
            earlier module that returns the size; or ``'square'``, a square map with
            the number of tokens of the trial.
        index (int): Index of the size among the pairs of integers there, or among
            the sizes that the module returns. Defaults to 0.
        length (int, optional): For ``'square'``, the number of tokens in the trial.
            Defaults to None.
    """

    def __init__(
        self, where: str, index: int = 0, length: Optional[int] = None
    ) -> None:
        self.where = where
        self.index = index
        self.length = length
        # A value rather than the object itself, so that copies of the network share it
        self.key = uuid.uuid4().hex

    def watch(self, module: nn.Module) -> Any:
        """Record the size of a module's map in each forward pass.

        Args:
            module (nn.Module): A module that runs before the blocks, such as the
                patch embedding, since a transformer layer does not know the size.

        Returns:
            RemovableHandle: Handle that removes the hook.
        """
        return module.register_forward_hook(_TellSize(self.key, self.index))

    def __call__(self, args: tuple, output: Any, length: int) -> Size:
        """Height and width for ``length`` tokens; ValueError if they do not match."""
        size: Optional[Size] = None
        if self.where == 'module':
            size = _sizes.of.get(self.key)
        elif self.where == 'square':
            if length == self.length:
                size = (round(length**0.5),) * 2
        else:
            values = pairs(output if self.where == 'output' else args)
            size = next((p for i, p in enumerate(values) if i == self.index), None)
        if size is None:
            raise ValueError(
                f'returned {length} tokens, but the height and width of their map are '
                'unknown'
            )
        if not torch.jit.is_tracing() and size[0] * size[1] != length:
            raise ValueError(
                f'returned {length} tokens, but their map is {size[0]}x{size[1]}'
            )
        return size


class _Sizes(threading.local):
    def __init__(self) -> None:
        self.of: Dict[str, Size] = {}


_sizes = _Sizes()


class _TellSize:
    """Forward hook that records the size of the map that a module returns."""

    def __init__(self, key: str, index: int) -> None:
        self.key, self.index = key, index

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        _sizes.of[self.key] = list(sizes(output))[self.index]


def tensors(value: Any, path: Path = ()) -> Iterator[Tuple[Path, Tensor]]:
    """Iterate over all tensors in nested tuples, lists and dicts, in order.

    Args:
        value (Any): Arguments or output of a module.
        path (tuple): Path of ``value`` itself. Defaults to ().

    Yields:
        tuple[tuple, Tensor]: The path to a tensor, see :class:`Features`, and the
        tensor.
    """
    if torch.is_tensor(value):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, (*path, key))


def count_alike(output: Any, features: Tensor) -> int:
    """Count the different tensors in an output that look like its features.

    Args:
        output (Any): What a block returned.
        features (Tensor): The features in it.

    Returns:
        int: Number of tensors with the same number of dimensions and the same batch
        size, such as the maps of several branches; 1 if there are only the features.
    """
    alike = {
        id(t)
        for _, t in tensors(output)
        if t.dim() == features.dim() and t.shape[:1] == features.shape[:1]
    }
    return len(alike)


def pairs(values: Any) -> Iterator[Size]:
    """Iterate over pairs of integers, nested or adjacent, in tuples and lists."""
    if not isinstance(values, (tuple, list)):
        return
    for first, second in zip(values, values[1:]):
        if _is_int(first) and _is_int(second):
            yield first, second
    for value in values:
        if isinstance(value, (tuple, list)) and len(value) == 2:
            yield from pairs(value)


def sizes(output: Any) -> Iterator[Size]:
    """Iterate over sizes of maps and pairs of integers in what a module returns."""
    for value in output if isinstance(output, (tuple, list)) else (output,):
        if torch.is_tensor(value) and value.dim() == 4:
            yield value.shape[2], value.shape[3]
            yield value.shape[1], value.shape[2]
    yield from pairs(output)


def _is_int(value: Any) -> bool:
    if torch.is_tensor(value):  # torch.jit.trace turns sizes into tensors
        return (
            torch.jit.is_tracing()
            and value.dim() == 0
            and value.dtype in (torch.int32, torch.int64)
        )
    return isinstance(value, int) and not isinstance(value, bool)


def _replaced(value: Any, path: Path, features: Tensor) -> Any:
    if not path:
        return features
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        result = copy.copy(value)
        result[key] = _replaced(value[key], rest, features)
        return result
    items = list(value)
    items[key] = _replaced(items[key], rest, features)
    if hasattr(value, '_make'):  # a namedtuple
        return value._make(items)
    return type(value)(items)


def _describe(output: Any) -> str:
    if torch.is_tensor(output):
        return f'a tensor {tuple(output.shape)}'
    inner = ', '.join(str(tuple(t.shape)) for _, t in tensors(output))
    return f'a {type(output).__name__} with tensors of shapes {inner or "none"}'


def _where(path: Path) -> str:
    return ''.join(f'[{key!r}]' for key in path) or 'the output itself'
