"""Check the arguments of a config before anything is built."""

import inspect
import numbers
import typing
from difflib import get_close_matches
from typing import Any, Dict, Iterable, Optional, Sequence, Union

KINDS = {
    bool: (lambda v: isinstance(v, bool), 'True or False'),
    int: (lambda v: _is_number(v, numbers.Integral), 'an integer'),
    float: (lambda v: _is_number(v, numbers.Real), 'a number'),
    str: (lambda v: isinstance(v, str), 'a string'),
    dict: (lambda v: isinstance(v, dict), 'a dict'),
}


def check_arguments(cls: type, arguments: Dict[str, Any]) -> None:
    """Check names and types of keyword arguments for a class.

    Args:
        cls (type): The class. If its constructor passes ``**kwargs`` on, the
            arguments of its base class are allowed too.
        arguments (dict): The arguments.

    Raises:
        TypeError: If an argument is unknown, or if its value does not have the
            annotated type. The message names the class, the value and what is
            allowed.
    """
    allowed = arguments_of(cls)
    if any(_is_opaque(vars(base).get('__init__')) for base in cls.__mro__):
        return  # a decorator hides the signature; let the constructor check
    for name, value in arguments.items():
        if name not in allowed:
            raise TypeError(
                f'{cls.__name__} has no argument {name!r}'
                f'{did_you_mean(name, allowed)}; its arguments are '
                f'{", ".join(allowed)}'
            )
        wanted = _wanted(value, allowed[name])
        if wanted:
            raise TypeError(
                f'{cls.__name__}: {name}={value!r} has type {type(value).__name__}, '
                f'but must be {wanted}'
            )


def arguments_of(cls: type) -> Dict[str, Any]:
    """List the arguments of a class's constructor with their annotations.

    Args:
        cls (type): The class.

    Returns:
        dict[str, Any]: Annotations by name; ``inspect.Parameter.empty`` for an
        argument without one.
    """
    annotations: Dict[str, Any] = {}
    for base in cls.__mro__:
        constructor = vars(base).get('__init__')
        if constructor is None:
            continue
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            ):
                annotations.setdefault(parameter.name, parameter.annotation)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return annotations


def _is_opaque(constructor: Any) -> bool:
    """Whether a Python function is declared as ``(self, *args, **kwargs)``."""
    if not inspect.isfunction(constructor):
        return False
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    kinds = {parameter.kind for parameter in parameters}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is closest to an unknown one.

    Args:
        name (str): The unknown name.
        known (Iterable[str]): Known names.

    Returns:
        str: Part of a message, such as ``" (did you mean 'head_dim'?)"``; empty if
        no name is close.
    """
    lower = {other.lower(): other for other in known}
    near = get_close_matches(str(name).lower(), lower, n=1)
    return f' (did you mean {lower[near[0]]!r}?)' if near else ''


def _wanted(value: Any, annotation: Any) -> Optional[str]:
    """Describe the allowed values; None if the value fits or the type is unknown."""
    options: Sequence[Any] = (annotation,)
    if typing.get_origin(annotation) is Union:
        options = typing.get_args(annotation)
    names = []
    for option in options:
        if option is type(None):
            fits, name = (lambda v: v is None), 'None'
        elif option in KINDS:
            fits, name = KINDS[option]
        else:
            return None  # not a simple type; the class checks it itself
        if fits(value):
            return None
        names.append(name)
    return ' or '.join(names)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
