"""What a checkpoint holds of the pruning hook, checked before a run goes on from it."""

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
    """What :meth:`LayerAttentionPruningHook.before_save_checkpoint` has saved.

    Attributes:
        history (list[PruningDecision]): The decisions so far.
        random_start (dict[str, Tensor]): Weights of query and key as they were drawn,
            by name of the attention.
        window (dict | None): The window in progress, as of
            :meth:`Measurement.state_dict`; of version 0.1 without ``put_off``.
    """

    history: List[PruningDecision]
    random_start: Dict[str, Tensor]
    window: Optional[Dict[str, Any]]

    @classmethod
    def read(cls, data: Any, settings: Dict[str, Any]) -> 'SavedPruning':
        """Read and check what a checkpoint holds.

        Args:
            data (Any): What is saved.
            settings (dict): Settings of the hook, for decisions of version 0.1.

        Raises:
            ValueError: If something is missing, or of another type or range; the
                message names the field.
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
        """Compare the decisions with what is active in a network.

        Args:
            model (nn.Module): The network that was loaded from the same file.

        Raises:
            ValueError: If an attention is active that a decision has pruned, is
                pruned that the last one has kept, or is not there.
        """
        attentions = layer_attentions(model)
        kept: Dict[str, bool] = {}
        for decision in self.history:
            kept.update((layer.name, not layer.pruned) for layer in decision.layers)
        faults = (
            ('are not in the network', [n for n in kept if n not in attentions]),
            (
                'are active, but pruned by a decision',
                [
                    n
                    for n, a in attentions.items()
                    if a.active and not kept.get(n, True)
                ],
            ),
            (
                'are pruned, but kept by the last decision',
                [n for n, a in attentions.items() if not a.active and kept.get(n)],
            ),
        )
        found = [f'{", ".join(names)} {what}' for what, names in faults if names]
        if found:
            raise ValueError(
                f'its decisions and its network contradict each other: '
                f'{"; ".join(found)}. Resume from another checkpoint, or begin a new '
                'run with this network by load_from without resume'
            )

    def restore_starts(self, attentions: Dict[str, LayerAttention]) -> None:
        """Give attentions the random start that they had.

        Args:
            attentions (dict[str, LayerAttention]): By name; others are left alone.

        Raises:
            ValueError: If one has query and key of another size.
        """
        for name, start in self.random_start.items():
            if name not in attentions:
                continue
            own = attentions[name].random_start
            shape = None if own is None else own.shape
            if start.shape != shape:
                raise ValueError(
                    f'random_start: {name} has the shape {tuple(start.shape)}, and the '
                    f'network {None if shape is None else tuple(shape)}'
                )
            attentions[name].random_start = start


def _check_window_state(state: Dict[str, Any]) -> None:
    check_window(state.get('window'))
    if 'put_off' not in state:
        return  # of version 0.1: the sums are not used
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
    # Other sums may be NaN, where a training has diverged: the decision says so.
    if not plain or not sums[-1] >= 0:
        raise ValueError(f'sums of {name} are no sums of numbers, the last their count')
