"""State of the pruning hook in a checkpoint, checked before a run resumes from it."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from ..layers import LayerAttention
from ..pruning import PruningDecision
from ..pruning.record import check_type, check_window, read_decisions, within
from ..structure import layer_attentions


@dataclass
class SavedPruning:
    """State saved by :meth:`LayerAttentionPruningHook.before_save_checkpoint`.

    Attributes:
        history (list[PruningDecision]): The decisions so far.
        random_start (dict[str, Tensor]): Random initial weights of query and key, by
            name of the attention.
        window (dict | None): The window in progress, see
            :meth:`Measurement.state_dict`; without ``put_off`` from version 0.1.
    """

    history: List[PruningDecision]
    random_start: Dict[str, Tensor]
    window: Optional[Dict[str, Any]]

    @classmethod
    def read(cls, data: Any, settings: Dict[str, Any]) -> 'SavedPruning':
        """Read and check the saved state.

        Args:
            data (Any): The saved state.
            settings (dict): Settings of the hook, for decisions of version 0.1.

        Raises:
            ValueError: If a field is missing, has the wrong type or is out of range;
                the message names the field.
        """
        check_type('the record', data, dict)
        history = read_decisions('history', data.get('history'), settings)
        starts = check_type('random_start', data.get('random_start', {}), dict)
        for name, start in starts.items():
            if start is not None:
                with within('random_start'):
                    check_type(name, start, Tensor)
        window = data.get('window')
        if window is not None:
            with within('window'):
                _check_window_state(check_type('the window', window, dict))
        known = {name: start for name, start in starts.items() if start is not None}
        return cls(history, known, window)

    def check_network(self, model: nn.Module) -> None:
        """Check that the decisions agree with a network.

        Args:
            model (nn.Module): The network loaded from the same file.

        Raises:
            ValueError: If an attention is missing, is active although a decision has
                pruned it, or is pruned although the last decision has kept it.
        """
        attentions = layer_attentions(model)
        kept: Dict[str, bool] = {}
        for decision in self.history:
            kept.update((layer.name, not layer.pruned) for layer in decision.layers)
        faults = (
            ('are not in the network', [n for n in kept if n not in attentions]),
            (
                'are active, but a decision has pruned them',
                [
                    n
                    for n, a in attentions.items()
                    if a.active and not kept.get(n, True)
                ],
            ),
            (
                'are pruned, but the last decision has kept them',
                [n for n, a in attentions.items() if not a.active and kept.get(n)],
            ),
        )
        messages = [f'{", ".join(names)} {fault}' for fault, names in faults if names]
        if messages:
            raise ValueError(
                f'its decisions and its network contradict each other: '
                f'{"; ".join(messages)}. Resume from another checkpoint, or start a '
                'new run from this network with load_from and without resume'
            )

    def restore_starts(self, attentions: Dict[str, LayerAttention]) -> None:
        """Set the random start of attentions.

        Args:
            attentions (dict[str, LayerAttention]): Attentions by name; those without a
                saved start do not change.

        Raises:
            ValueError: If query and key of an attention have another size.
        """
        for name, start in self.random_start.items():
            if name not in attentions:
                continue
            current = attentions[name].random_start
            shape = None if current is None else current.shape
            if start.shape != shape:
                raise ValueError(
                    f'random_start: {name} has the shape {tuple(start.shape)}, but in '
                    f'the network {None if shape is None else tuple(shape)}'
                )
            attentions[name].random_start = start


def _check_window_state(state: Dict[str, Any]) -> None:
    check_window(state.get('window'))
    if 'put_off' not in state:
        return  # the sums of version 0.1 are not used
    for key in ('put_off', 'done'):
        if check_type(key, state.get(key), int) < 0:
            raise ValueError(f'{key}={state[key]} is negative')
    sums = check_type('sums', state.get('sums'), dict)
    with within('sums'):
        check_type('reduction', sums.get('reduction'), str)
        check_type('eps', sums.get('eps'), float)
        for key, kind in (('attentions', list), ('sums', Tensor)):
            for name, value in check_type(key, sums.get(key), dict).items():
                with within(key):
                    check_type(str(name), value, kind)
        for name, value in sums['sums'].items():
            _check_sums(name, value)


def _check_sums(name: str, sums: Tensor) -> None:
    plain = sums.dtype == torch.float64 and sums.dim() == 1 and len(sums)
    # The other sums may be NaN if training has diverged; the decision reports that.
    if not plain or not sums[-1] >= 0:
        raise ValueError(f'the sums of {name} are not float64 sums with a count >= 0')
