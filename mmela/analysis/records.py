"""Types of the JSON files that the tools in tools/analysis write."""

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
    """Attention weights by querying block and attended block.

    Attributes:
        mean (list[list[float | None]]): T lists of T weights, averaged over heads;
            None for a missing weight.
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
    """Similarity of the keys of every two of ``blocks``."""

    blocks: List[int]
    mean: List[List[float]]
    std: List[List[float]]
    overall: float


class Before(TypedDict):
    """Share of the previous stage's memory, by block."""

    mean: Numbers
    heads: List[Numbers]


class Scores(Maps):
    """Shares of the blocks in the features that KCLA retrieves."""

    temperatures: List[float]
    limited: List[float]
    before: Before


class Contributions(TypedDict):
    """Final weights of the terms of a recurrence, by block."""

    blocks: List[int]
    mean: List[float]
    std: List[float]
    previous: Optional[str]


class Stage(TypedDict):
    """Measurements of a stage; None where not applicable."""

    attention: str
    states: List[Literal['active', 'value_only', 'pruned', 'none']]
    maps: Optional[Maps]
    features: Optional[List[Similarity]]
    queries: Optional[List[Similarity]]
    contributions: Optional[Contributions]
    keys: NotRequired[Optional[Keys]]  # not in format 1
    scores: NotRequired[Optional[Scores]]


class Measurement(TypedDict):
    """``layer_attention.json``, written by ``mmela layer-attention``."""

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
    """Predictions of one of the two networks."""

    checkpoint: str
    epoch: Optional[int]
    iteration: Optional[int]
    active: int
    attentions: int
    mean: Optional[float]
    per_class: List[ClassValue]
    curves: NotRequired[Dict[str, List[float]]]


class Shown(TypedDict):
    """An image on the page, for a detector or a classifier."""

    image: str
    objects: NotRequired[int]
    pictures: NotRequired[Dict[Literal['truth', 'before', 'after'], str]]
    counts: NotRequired[Dict[Literal['before', 'after'], Tuple[int, int]]]
    picture: NotRequired[str]
    truth: NotRequired[List[int]]
    before: NotRequired[List[Tuple[int, float]]]
    after: NotRequired[List[Tuple[int, float]]]


class BeforeAfter(TypedDict):
    """``before_after.json``, written by :mod:`mmela.analysis.before_after`."""

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
        source (str): The tool that writes it, for the message.

    Returns:
        Measurement | BeforeAfter: The content.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If its content is invalid.
    """
    try:
        return msgspec.convert(json.loads(path.read_text('utf-8')), kind)
    except (RecursionError, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(
            f'{path} was not written by {source}: {one_line(error)}'
        ) from error


def read_measurement(path: Path) -> Measurement:
    """Read and check ``layer_attention.json``, see :func:`read_record`."""
    source = 'tools/analysis/layer_attention.py'
    result = read_record(path, Measurement, source)
    try:
        for name in result['stages']:
            check_name(name)
        if result['decision']:
            PruningDecision.from_dict(result['decision'])
    except ValueError as error:
        raise ValueError(
            f'{path} was not written by {source}: {one_line(error)}'
        ) from error
    return result
