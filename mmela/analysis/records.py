"""What the tools of tools/analysis measure, as their JSON files hold it."""

import json
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Type, TypeVar

import msgspec
from typing_extensions import Literal, NotRequired, TypedDict

from ..command_line import one_line
from ..pruning import PruningDecision
from ..pruning.record import check_name

Numbers = List[Optional[float]]
T = TypeVar('T')


class Maps(TypedDict):
    """Attention weights by block that asks and block attended to.

    Attributes:
        mean (list[list[float | None]]): T lists of T weights, mean over heads;
            None where there is none.
        heads (list[list[list[float | None]]]): The same for each of G heads.
    """

    mean: List[Numbers]
    heads: List[List[Numbers]]


class Similarity(TypedDict):
    """Similarity of two blocks: mean and standard deviation over images."""

    blocks: List[int]
    mean: float
    std: float


class Keys(TypedDict):
    """Similarity of the keys of each two of ``blocks``."""

    blocks: List[int]
    mean: List[List[float]]
    std: List[List[float]]
    overall: float


class Before(TypedDict):
    """Share of what was taken over from the stage before, by block."""

    mean: Numbers
    heads: List[Numbers]


class Scores(Maps):
    """Shares of the blocks in what a KCLA retrieves."""

    temperatures: List[float]
    limited: List[float]
    before: Before


class Contributions(TypedDict):
    """Weights that a recurrence leaves to its earlier terms, by block."""

    blocks: List[int]
    mean: List[float]
    std: List[float]
    previous: Optional[str]


class Stage(TypedDict):
    """What was measured on a stage; None where something does not apply."""

    attention: str
    states: List[Literal['active', 'value_only', 'pruned', 'none']]
    maps: Optional[Maps]
    features: Optional[List[Similarity]]
    queries: Optional[List[Similarity]]
    contributions: Optional[Contributions]
    keys: NotRequired[Optional[Keys]]  # not in format 1
    scores: NotRequired[Optional[Scores]]


class Measurement(TypedDict):
    """``layer_attention.json``, of tools/analysis/layer_attention.py."""

    format: Literal[1, 2]
    checkpoint: str
    data: str
    images: int
    stages: Dict[str, Stage]
    histogram: Optional[List[float]]
    decision: Optional[dict]
    left_out: List[str]


class ClassValue(TypedDict):
    """AP or accuracy of a class."""

    label: int
    objects: int
    value: float
    curve: NotRequired[List[float]]


class Side(TypedDict):
    """What one of the two networks finds."""

    checkpoint: str
    epoch: Optional[int]
    iteration: Optional[int]
    active: int
    attentions: int
    mean: Optional[float]
    per_class: List[ClassValue]
    curves: NotRequired[Dict[str, List[float]]]


class Shown(TypedDict):
    """An image that the page shows, of a detector or of a classifier."""

    image: str
    objects: NotRequired[int]
    pictures: NotRequired[Dict[Literal['truth', 'before', 'after'], str]]
    counts: NotRequired[Dict[Literal['before', 'after'], Tuple[int, int]]]
    picture: NotRequired[str]
    truth: NotRequired[List[int]]
    before: NotRequired[List[Tuple[int, float]]]
    after: NotRequired[List[Tuple[int, float]]]


class BeforeAfter(TypedDict):
    """``before_after.json``, of :mod:`mmela.analysis.before_after`."""

    format: Literal[1]
    stamp: list
    kind: Literal['detections', 'classes']
    note: str
    images: int
    total: int
    classes: List[str]
    sides: Dict[Literal['before', 'after'], Side]
    shown: List[Shown]


def read_record(path: Path, kind: Type[T], source: str) -> T:
    """Read and check one of these files.

    Args:
        path (Path): The file.
        kind (type): :class:`Measurement` or :class:`BeforeAfter`.
        source (str): What writes it, for the message.

    Returns:
        Measurement | BeforeAfter: What it holds.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds something else.
    """
    try:
        return msgspec.convert(json.loads(path.read_text('utf-8')), kind)
    except (RecursionError, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(f'{path} is not of {source}: {one_line(error)}') from error


def read_measurement(path: Path) -> Measurement:
    """Read and check ``layer_attention.json``, as :func:`read_record` does."""
    source = 'tools/analysis/layer_attention.py'
    result = read_record(path, Measurement, source)
    try:
        for name in result['stages']:
            check_name(name)
        if result['decision']:
            PruningDecision.from_dict(result['decision'])
    except ValueError as error:
        raise ValueError(f'{path} is not of {source}: {one_line(error)}') from error
    return result
