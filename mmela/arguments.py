"""Check the arguments of a config before anything is built."""

import inspect
import math
import numbers
import typing
from abc import ABCMeta
from collections import abc
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple, Union

# Check and description of each simple annotation
KINDS = {
    bool: (lambda v: isinstance(v, bool), 'True or False'),
    int: (lambda v: _is_number(v, numbers.Integral), 'an integer'),
    float: (lambda v: _is_number(v, numbers.Real), 'a number'),
    str: (lambda v: isinstance(v, str), 'a string'),
    dict: (lambda v: isinstance(v, dict), 'a dict'),
    type(None): (lambda v: v is None, 'None'),
}


class CheckedArguments(ABCMeta):
    """Metaclass that checks arguments before the constructor runs.

    The constructor's signature gives names and types, see :func:`check_arguments`.
    """

    def __call__(cls, *args, **kwargs):
        check_arguments(cls, kwargs, args)
        return super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """Signature of the constructor, which help() and the docs show."""
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def check_arguments(
    target: Callable,
    arguments: Dict[str, Any],
    positional: Sequence[Any] = (),
    name: str = '',
) -> None:
    """Check names and types of the arguments of a class or function.

    Args:
        target (callable): The class or function. If a constructor passes ``**kwargs``
            on, the arguments of its base class are allowed too.
        arguments (dict): The keyword arguments.
        positional (Sequence): The positional arguments. Defaults to none.
        name (str): Name for the message. Defaults to the name of the target.

    Raises:
        TypeError: If an argument is unknown or given twice, or if its value does not
            have the annotated type. The message names the target, the value and what
            is allowed.
    """
    name = name or target.__name__
    if any(map(_is_opaque, _signatures(target))):
        return  # a decorator hides the signature; let the constructor check
    allowed = arguments_of(target)
    by_position = dict(zip(allowed, positional))
    for key in arguments:
        if key not in allowed:
            raise TypeError(
                f'{name} has no argument {key!r}{did_you_mean(key, allowed)}; its '
                f'arguments are {", ".join(allowed)}'
            )
        if key in by_position:
            raise TypeError(f'{name}: {key} is given twice, by position and by name')
    for key, value in {**by_position, **arguments}.items():
        if not _fits(value, allowed[key]):
            part, annotation = _misfit(value, allowed[key])
            where = '' if part is value else f': {part!r:.200}'
            raise TypeError(
                f'{name}: {key}={value!r:.200}{where} has type '
                f'{type(part).__name__}, but must be {_described(annotation)}'
            )


def arguments_of(target: Callable) -> Dict[str, Any]:
    """List the arguments of a function or of a class's constructor.

    Args:
        target (callable): The class or function.

    Returns:
        dict[str, Any]: Annotations by name, in order; ``inspect.Parameter.empty``
        for an argument without one.
    """
    annotations: Dict[str, Any] = {}
    for parameters in _signatures(target):
        for parameter in parameters:
            if parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            ):
                annotations.setdefault(parameter.name, parameter.annotation)
    return annotations


@lru_cache(maxsize=256)
def _signatures(target: Callable) -> List[List[inspect.Parameter]]:
    """Parameters of a function, or of each constructor that a class calls."""
    found = []
    functions = [target]
    if inspect.isclass(target):
        constructors = [vars(base).get('__init__') for base in target.__mro__]
        functions = [function for function in constructors if function is not None]
    for function in functions:
        parameters = list(inspect.signature(function).parameters.values())
        try:  # annotations may be strings
            hints = typing.get_type_hints(function)
        except Exception:  # some names may only exist for type checkers
            hints = {}
        found.append(
            [
                p.replace(annotation=hints.get(p.name, p.annotation))
                for p in parameters[inspect.isclass(target) :]
            ]
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _is_opaque(parameters: Iterable[inspect.Parameter]) -> bool:
    """Whether a function is declared with ``*args, **kwargs`` only."""
    kinds = {parameter.kind for parameter in parameters}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


# -- names ---------------------------------------------------------------------------


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Suggest the known name that is closest to an unknown one.

    Args:
        name (Any): The unknown name.
        known (Iterable[str]): Known names.

    Returns:
        str: Such as ``" (did you mean 'head_dim'?)"``; empty if none is near.
    """
    lower = {other.lower(): other for other in known}
    near = get_close_matches(str(name).lower(), lower, n=1)
    return f' (did you mean {lower[near[0]]!r}?)' if near else ''


def nearest_first(name: Any, known: Iterable[str]) -> List[str]:
    """Sort known names by their similarity to an unknown one.

    Args:
        name (Any): The unknown name.
        known (Iterable[str]): Known names.

    Returns:
        list[str]: All names: first those that contain the unknown one, then the
        others, the most similar first.
    """
    wanted = str(name).lower()
    matcher = SequenceMatcher(b=wanted)

    def unlike(other: str) -> Tuple[bool, float]:
        matcher.set_seq1(other.lower())
        return wanted not in other.lower(), -matcher.ratio()

    return sorted(known, key=unlike)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check that an argument is one of the allowed strings.

    Args:
        name (str): Name of the argument.
        value (Any): Its value.
        allowed (Sequence[str]): The allowed strings.

    Raises:
        ValueError: If it is not; the message lists the allowed strings.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f'{name}={value!r:.200} is unknown{did_you_mean(value, allowed)}; allowed '
            f'are {", ".join(map(repr, allowed))}'
        )


@contextmanager
def building(name: str, cfg: Any) -> Iterator[None]:
    """Add the name and value of an argument to errors of building from it.

    Args:
        name (str): Name of the argument.
        cfg (Any): Its value.

    Raises:
        ValueError: If building raises a KeyError, TypeError or ValueError.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = ' '.join(str(error.args[0] if error.args else error).split())
        raise ValueError(f'{name}={cfg!r:.200}: {reason}') from error


# -- numbers -------------------------------------------------------------------------


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Check the range of a number.

    Args:
        name (str): Name of the argument.
        value (Any): Its value.
        low (float): Minimum.
        high (float): Maximum. Defaults to infinity, which itself is not allowed.
        open_low (bool): Exclude ``low`` itself. Defaults to False.
        open_high (bool): Exclude ``high`` itself. Defaults to False.

    Returns:
        float: The value.

    Raises:
        ValueError: If it is not a number from ``low`` to ``high``.
    """
    open_high = open_high or high == math.inf
    # NaN fails every comparison.
    if (
        not _is_number(value, numbers.Real)
        or not (low < value if open_low else low <= value)
        or not (value < high if open_high else value <= high)
    ):
        left, right = '(' if open_low else '[', ')' if open_high else ']'
        raise ValueError(
            f'{name}={value!r:.200} is not a number in {left}{low:g}, {high:g}{right}'
        )
    return value


def check_count(name: str, value: Any, low: int) -> int:
    """Check an integer.

    Args:
        name (str): Name of the argument.
        value (Any): Its value.
        low (int): Minimum.

    Returns:
        int: The value.

    Raises:
        ValueError: If it is not an integer, or less than ``low``.
    """
    if not _is_number(value, numbers.Integral) or value < low:
        raise ValueError(f'{name}={value!r:.200} is not an integer >= {low}')
    return int(value)


# -- types ---------------------------------------------------------------------------


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value has the annotated type; True if the annotation is not simple."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in KINDS:
        return KINDS[annotation][0](value)
    if origin is Union:
        return any(_fits(value, option) for option in inner)
    if not inner:
        return True  # not a simple type; the class checks it itself
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items()
        )
    if origin in (tuple, list, abc.Sequence):  # configs may use lists for tuples
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and Ellipsis not in inner:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(item, inner[0]) for item in value)
    return True


def _misfit(value: Any, annotation: Any) -> Tuple[Any, Any]:
    """The first wrong entry of a list with its annotation, or else the whole value."""
    inner = typing.get_args(annotation)
    is_list = typing.get_origin(annotation) in (list, abc.Sequence) or Ellipsis in inner
    if is_list and isinstance(value, (list, tuple)):
        return next((v, inner[0]) for v in value if not _fits(v, inner[0]))
    return value, annotation


def _described(annotation: Any) -> str:
    """Describe the allowed values in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in KINDS:
        return KINDS[annotation][1]
    if origin is Union:
        return ' or '.join(map(_described, inner))
    if origin is dict and inner:
        return f'a dict from {_described(inner[0])} to {_described(inner[1])}'
    if origin is tuple and Ellipsis not in inner:
        return f'({", ".join(map(_described, inner))})'
    if origin in (tuple, list, abc.Sequence) and inner:
        return f'a list with each entry {_described(inner[0])}'
    return getattr(annotation, '__name__', str(annotation))
