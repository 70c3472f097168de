"""The record of a pruning decision and of the numbers behind it."""

import itertools
import json
import math
import os
import re
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from ..arguments import check_number
from ..files import write_text
from .signal import has_learned, learning_state

FORMAT = 2
NUMBERS = (
    'divergence',
    'shape',
    'own',
    'baseline',
    'value',
    'normalized',
    'mapped',
    'threshold',
    'quantile',
)
# Settings that format 1 stored once for all decisions
_SETTINGS = ('policy', 'reduction', 'eps', 'keep_value')


@dataclass(frozen=True)
class LayerDecision:
    """A policy's decision on one active layer attention.

    Attributes:
        name (str): Name of the attention, ``backbone.layer1.0.layer_attn``.
        stage (str): Name of its stage, ``backbone.layer1``.
        divergence (float | None): KL divergence in nats from the previous active
            attention; None if not measured.
        shape (float | None): Its shape part: how differently the two attentions
            mix the tokens that they share, see :func:`~mmela.pruning.split_kl`;
            None if unknown.
        own (float | None): Its other part: how much weight the attention puts on
            its own token.
        baseline (float | None): The divergence of uniform attention there.
        value (float | None): The value that the policy judged by its criterion:
            the divergence or a substitute.
        normalized (float | None): That value normalised, before mapping.
        mapped (float | None): The number compared with ``threshold``.
        threshold (float | None): None for a policy without one.
        quantile (float | None): The largest value that a candidate of its
            pool may have.
        selected (bool): Whether it was a candidate.
        pruned (bool): Whether it was pruned.
        reason (str): Why it was pruned or kept.
    """

    name: str
    stage: str
    divergence: Optional[float] = None
    shape: Optional[float] = None
    own: Optional[float] = None
    baseline: Optional[float] = None
    value: Optional[float] = None
    normalized: Optional[float] = None
    mapped: Optional[float] = None
    threshold: Optional[float] = None
    quantile: Optional[float] = None
    selected: bool = False
    pruned: bool = False
    reason: str = 'kept: not measured'

    def to_dict(self) -> Dict[str, Any]:
        """Convert to plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> 'LayerDecision':
        """Read and check the result of :meth:`to_dict`, or of format 1.

        Raises:
            ValueError: If a key is missing or unknown, or a value is invalid.
        """
        data = dict(check_type('a layer', data, dict))
        if 'kl' in data:  # format 1 stored no candidates and no quantile
            data['divergence'] = data.pop('kl')
            data['pruned'] = data.pop('skip', None)
            data['selected'] = (
                data['divergence'] is not None
                and data.get('reason') != 'kept: above the quantile'
            )
            data = {key: data[key] for key in cls.__annotations__ if key in data}
        # Earlier versions judged the divergence itself.
        data.setdefault('value', data.get('divergence'))
        try:
            layer = cls(**data)
        except TypeError as error:
            raise ValueError(f'a layer has the keys {sorted(data)}: {error}') from error
        for key in ('name', 'stage'):
            check_name(getattr(layer, key))
        for key in NUMBERS:
            value = getattr(layer, key)
            if value is not None and not math.isfinite(check_type(key, value, float)):
                raise ValueError(f'{key}={value} is not finite')
        if (layer.mapped is None) != (layer.normalized is None):
            raise ValueError(
                f'{layer.name} must have both normalized and mapped, or neither'
            )
        if layer.divergence is None and layer.mapped is not None:
            raise ValueError(f'{layer.name} has mapped, but no divergence')
        for key in ('selected', 'pruned'):
            check_type(key, getattr(layer, key), bool)
        check_type('reason', layer.reason, str)
        return layer


@dataclass(frozen=True)
class PruningDecision:
    """One decision on all active layer attentions.

    Attributes:
        layers (tuple[LayerDecision]): In the order of the network.
        policy (dict): Config of the policy, defaults included.
        reduction (str): How divergences were averaged.
        eps (float): Probability of tokens that the earlier attention lacks.
        keep_value (bool): Whether a pruned attention keeps its key and value.
        window (tuple[int, int] | None): First and last epoch or iteration
            measured; None outside of a training.
        unit (str | None): ``'epoch'`` or ``'iteration'``.
        iteration (int | None): Training iterations done before it.
        put_off (int): Epochs or iterations by which the window was put off
            because the attentions had not learned yet.
        deviation (float | None): See :func:`~mmela.pruning.deviation`; None
            if nothing was measured.
        movement (float | None): Relative distance of query and key from their
            random start, see :func:`~mmela.pruning.has_learned`.
    """

    layers: Tuple[LayerDecision, ...]
    policy: dict
    reduction: str = 'mean_kl'
    eps: float = 1e-8
    keep_value: bool = False
    window: Optional[Tuple[int, int]] = None
    unit: Optional[str] = None
    iteration: Optional[int] = None
    put_off: int = 0
    deviation: Optional[float] = None
    movement: Optional[float] = None

    @property
    def learned(self) -> Optional[bool]:
        """bool | None: See :func:`~mmela.pruning.has_learned`."""
        return has_learned(self.deviation, self.movement)

    @property
    def warning(self) -> Optional[str]:
        """str | None: Why the decision is close to arbitrary, without the final
        full stop; None if it is not, or if the criterion is a control."""
        control = self.policy.get('criterion') in ('random', 'position')
        if self.learned is not False or control:
            return None
        return learning_state(self.deviation, self.movement)

    @property
    def planned(self) -> Optional[Tuple[int, int]]:
        """tuple[int, int] | None: The window as configured, before put-offs."""
        if self.window is None:
            return None
        return self.window[0] - self.put_off, self.window[1] - self.put_off

    @property
    def pruned(self) -> Tuple[str, ...]:
        """tuple[str]: Names of the attentions that it prunes."""
        return tuple(layer.name for layer in self.layers if layer.pruned)

    @property
    def active(self) -> Tuple[str, ...]:
        """tuple[str]: Names of the attentions that it keeps."""
        return tuple(layer.name for layer in self.layers if not layer.pruned)

    def to_dict(self) -> Dict[str, Any]:
        """Convert to plain values for JSON."""
        return json.loads(json.dumps(dict(asdict(self), learned=self.learned)))

    @classmethod
    def from_dict(
        cls, data: dict, hook: Optional[Dict[str, Any]] = None
    ) -> 'PruningDecision':
        """Read and check the result of :meth:`to_dict`, or of format 1.

        Args:
            data (dict): The decision.
            hook (dict, optional): Settings of the hook, which format 1 stored
                once for all decisions. Defaults to None.

        Raises:
            ValueError: If a key is missing or a value is invalid.
        """
        values = {key: hook[key] for key in _SETTINGS if hook and key in hook}
        values.update(check_type('a decision', data, dict))
        layers = []
        for index, layer in enumerate(check_type('layers', values.get('layers'), list)):
            with within(f'layers[{index}]'):
                layers.append(LayerDecision.from_dict(layer))
                if layers[-1].name in [other.name for other in layers[:-1]]:
                    raise ValueError(f'name={layers[-1].name!r} appears twice')
        values['layers'] = tuple(layers)
        if values.get('window') is not None:
            values['window'] = check_window(values['window'])
        try:
            decision = cls(**{k: values[k] for k in cls.__annotations__ if k in values})
        except TypeError as error:
            raise ValueError(f'a decision: {error}') from error
        check_type('policy', decision.policy, dict)
        check_type('the type of policy', decision.policy.get('type'), str)
        check_type('reduction', decision.reduction, str)
        check_number('eps', decision.eps, 0, 1, open_low=True, open_high=True)
        check_type('keep_value', decision.keep_value, bool)
        if decision.unit not in (None, 'epoch', 'iteration'):
            raise ValueError(f"unit={decision.unit!r} is not 'epoch' or 'iteration'")
        for key, kind in dict(
            iteration=int, put_off=int, deviation=float, movement=float
        ).items():
            value = getattr(decision, key)
            if value is not None:
                check_number(key, check_type(key, value, kind), 0)
        return decision


@dataclass(frozen=True)
class PruningReport:
    """``pruning.json``: the decisions of a run.

    Attributes:
        hook (dict): Settings of the hook in its latest run: ``windows``,
            ``by_epoch``, ``policy``, ``keep_value``, ``reduction``, ``eps``.
        decisions (tuple[PruningDecision]): In order.
    """

    hook: Dict[str, Any]
    decisions: Tuple[PruningDecision, ...] = ()

    def write(self, path: Union[str, Path]) -> None:
        """Write the file completely or not at all.

        Args:
            path (str | Path): The file.
        """
        content = dict(
            format=FORMAT,
            hook=self.hook,
            decisions=[decision.to_dict() for decision in self.decisions],
        )
        write_text(path, json.dumps(content, indent=2))

    @classmethod
    def read(cls, path: Union[str, Path]) -> 'PruningReport':
        """Read and check a file of format 1 or 2.

        Args:
            path (str | Path): The file.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is not a valid report of the hook.
        """
        try:
            content = json.loads(Path(path).read_text(encoding='utf-8'))
            check_type('the content', content, dict)
            number = content.get('format', 1)
            if number not in (1, FORMAT):
                raise ValueError(f'format={number!r} is not 1 or {FORMAT}')
            hook = dict(check_type('hook', content.get('hook'), dict))
            hook['windows'] = list(
                map(check_window, check_type('windows', hook.get('windows'), list))
            )
            check_type('policy', hook.get('policy'), dict)
            for key in ('by_epoch', 'keep_value'):
                check_type(key, hook.get(key), bool)
            key = 'decisions' if number == FORMAT else 'prunings'
            return cls(hook, tuple(read_decisions(key, content.get(key), hook)))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'{path} is not a report of the pruning hook: {error}'
            ) from error


def read_decisions(key: str, data: Any, hook: Dict[str, Any]) -> List[PruningDecision]:
    """Read and check the decisions of a run.

    Args:
        key (str): Name of the field in the file.
        data (Any): The decisions, see :meth:`PruningDecision.to_dict`.
        hook (dict): Settings of the hook, which format 1 stored only once.

    Returns:
        list[PruningDecision]: The decisions in order.

    Raises:
        ValueError: If the data are malformed, or if a decision lists an attention that
            an earlier one has pruned. The message names the field.
    """
    decisions: List[PruningDecision] = []
    for index, item in enumerate(check_type(key, data, list)):
        with within(f'{key}[{index}]'):
            decision = PruningDecision.from_dict(item, hook)
            for name in ('window', 'unit', 'iteration'):
                if getattr(decision, name) is None:
                    raise ValueError(f'a decision has no {name}')
            for number, earlier in enumerate(decisions):
                again = {layer.name for layer in decision.layers} & set(earlier.pruned)
                if again:
                    raise ValueError(
                        f'layers has {", ".join(sorted(again))}, which '
                        f'{key}[{number}] has already pruned'
                    )
            decisions.append(decision)
    return decisions


def keep_earlier(path: Union[str, Path]) -> None:
    """Rename the report of an earlier run, with its date in the name.

    Args:
        path (str | Path): Path of the new report.
    """
    path = Path(path)
    if not path.exists():
        return
    stamp = time.strftime('%Y%m%d_%H%M%S', time.localtime(path.stat().st_mtime))
    for number in itertools.count(1):
        more = f'_{number}' if number > 1 else ''
        kept = path.with_name(f'{path.stem}_{stamp}{more}{path.suffix}')
        if not kept.exists():
            os.replace(path, kept)
            return


@contextmanager
def within(part: str) -> Iterator[None]:
    """Put the name of a part of a file in front of its errors.

    Args:
        part (str): Name of the part, such as ``layers[2]``.

    Raises:
        ValueError: If the body raises one.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{part}: {error}') from error


def check_name(name: str) -> str:
    """Check that a name is safe in file names and on a terminal.

    Raises:
        ValueError: If it has characters that module names do not have.
    """
    if not isinstance(name, str) or not re.fullmatch(r'[\w.\-]+', name):
        raise ValueError(
            f'{name!r} is not a module name; allowed are letters, digits, dots, '
            'underscores and hyphens'
        )
    return name


def check_type(key: str, value: Any, kind: type) -> Any:
    """Check the type of a value from a file, and that an integer is not too large.

    Args:
        key (str): Name of the field.
        value (Any): The value.
        kind (type): The type; a float may be an integer.

    Returns:
        Any: The value.

    Raises:
        ValueError: If the value has another type; the message names the field.
    """
    fits = isinstance(value, (int, float) if kind is float else kind)
    odd = isinstance(value, bool) and kind is not bool
    if not fits or odd or type(value) is int and abs(value) >= 2**53:
        raise ValueError(f'{key}={value!r:.99} is not of type {kind.__name__}')
    return value


def check_window(bounds: Any) -> Tuple[int, int]:
    """Check a window from a file.

    Args:
        bounds (Any): Its first and last epoch or iteration.

    Returns:
        tuple[int, int]: The window.

    Raises:
        ValueError: If it is not a window.
    """
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        raise ValueError(f'window={bounds!r:.99} is not a pair of integers')
    first, last = (check_type('a bound of a window', bound, int) for bound in bounds)
    if not 1 <= first <= last:
        raise ValueError(
            f'window={bounds!r:.99} must start at 1 or later, and not end before'
        )
    return first, last
