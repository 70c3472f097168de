import warnings
from statistics import median
from typing import Any, Dict, List, Optional, Sequence, Union

import torch
from mmengine.dist import all_reduce, is_main_process
from torch import Tensor

from ..arguments import check_choice, check_number
from ..layers import AttentionState
from ..pruning import (
    Divergence,
    PruningDecision,
    PruningPolicy,
    deviation,
    safe_log,
    split_kl,
)
from ..structure import AttentionStage

REDUCTIONS = ('mean_kl', 'mean_distribution')


def check_measurement(reduction: str, eps: float) -> None:
    """Check the settings of a measurement.

    Args:
        reduction (str): See :class:`KLMeter`.
        eps (float): See :class:`KLMeter`.

    Raises:
        ValueError: If ``reduction`` is unknown or ``eps`` is out of range.
    """
    check_choice('reduction', reduction, REDUCTIONS)
    check_number('eps', eps, 0, 1, open_low=True, open_high=True)


class KLMeter:
    """Accumulates the divergences of a stage's attentions over many batches.

    Set it as the observer of an :class:`~mmela.structure.AttentionStage`. The sums
    stay on the device in double precision; only :meth:`compute` waits for it.

    Args:
        stage (AttentionStage): The stage to measure. Its active attentions
            must not change while the meter is in use.
        reduction (str): ``'mean_kl'`` computes the KL divergence per sample and
            head and averages it; ``'mean_distribution'`` computes the KL
            divergence between the mean distributions. Defaults to
            ``'mean_kl'``.
        eps (float): Probability given to the tokens that the earlier of two
            attentions lacks (ELA, eq. 8). Defaults to 1e-8.
    """

    def __init__(
        self, stage: AttentionStage, reduction: str = 'mean_kl', eps: float = 1e-8
    ) -> None:
        self.reduction = reduction
        self.eps = eps
        self.training_only = False
        # Number of tokens that each active attention attends over, by name
        self.tokens: Dict[str, int] = {}
        self.identity: List[str] = []
        seen, before = 0, None
        device = torch.device('cpu')
        for name, attention in stage.named.items():
            if attention.attention_state != AttentionState.PRUNED:
                seen += attention.opens_token(before)
                before = attention
            if attention.active:
                self.tokens[name] = seen
            self.identity.append(
                f'{name} ({type(attention).__name__}, '
                f'head_dim={getattr(attention, "head_dim", None)}, '
                f'{attention.attention_state.name.lower()})'
            )
            device = attention.state.device
        size = (
            sum(self.tokens.values())
            if reduction == 'mean_distribution'
            else 2 * max(len(self.tokens) - 1, 0)
        )
        # The last element counts the summed distributions: samples times heads (times
        # positions). One tensor needs only one reduction over ranks.
        self.sums = torch.zeros(size + 1, dtype=torch.float64, device=device)

    def __call__(self, scores: List[Tensor]) -> None:
        """Add a batch.

        Args:
            scores (list[Tensor]): Scores before the softmax of the active
                attentions, each (B, G, t) or (B, G, P, t), without gradient.
        """
        idle = self.training_only and not torch.is_grad_enabled()
        if len(scores) < 2 or idle:
            return
        log_probs = [score.double().log_softmax(-1) for score in scores]
        if self.reduction == 'mean_distribution':
            sums = [log_p.exp().flatten(0, -2).sum(0) for log_p in log_probs]
        else:
            sums = [
                part.sum()[None]
                for log_p, log_q in zip(log_probs, log_probs[1:])
                for part in split_kl(log_p, log_q, self.eps)
            ]
        count = scores[0].new_full((1,), scores[0][..., 0].numel())
        self.sums += torch.cat([*sums, count.double()])

    def compute(self) -> Dict[str, Optional[Divergence]]:
        """KL divergence of each active attention from its predecessor.

        Returns:
            dict[str, Divergence | None]: The divergences by name; None for the
            first attention, and for all if the stage has not run.
        """
        sums, count = self.sums[:-1].cpu(), self.sums[-1].cpu()
        if not count:
            return dict.fromkeys(self.tokens)
        tokens = list(self.tokens.values())
        if self.reduction == 'mean_kl':
            parts = (sums / count).view(-1, 2).tolist()
        else:
            log_probs = list(map(safe_log, (sums / count).split(tokens)))
            parts = [
                list(map(float, split_kl(log_p, log_q, self.eps)))
                for log_p, log_q in zip(log_probs, log_probs[1:])
            ]
        values = [
            Divergence(shape, own, before, now - before)
            for (shape, own), before, now in zip(parts, tokens, tokens[1:])
        ]
        return dict(zip(self.tokens, [None, *values]))


class NetworkKLMeter:
    """A :class:`KLMeter` for each stage of a network.

    Args:
        stages (dict[str, AttentionStage]): The stages by name.
        reduction (str): See :class:`KLMeter`. Defaults to ``'mean_kl'``.
        eps (float): See :class:`KLMeter`. Defaults to 1e-8.

    Raises:
        ValueError: If no stage has an attention that can be measured.

    Attributes:
        sums (Tensor): Sums of all stages, one after the other, (N,).
    """

    def __init__(
        self,
        stages: Dict[str, AttentionStage],
        reduction: str = 'mean_kl',
        eps: float = 1e-8,
    ) -> None:
        attentions = [a for stage in stages.values() for a in stage.attentions]
        if not any(attention.prunable for attention in attentions):
            kinds = sorted({type(attention).__name__ for attention in attentions})
            raise ValueError(
                f'there is nothing to measure: none of the {len(stages)} stages has an '
                'attention that computes a distribution over layers, such as MRLABase; '
                f'they have {", ".join(kinds) or "no attention"}'
            )
        self.stages = stages
        self.reduction = reduction
        self.eps = eps
        self.meters = {
            name: KLMeter(stage, reduction, eps) for name, stage in stages.items()
        }
        # The meters' sums are views of one tensor, which is reduced at once.
        parts = [meter.sums for meter in self.meters.values()]
        self.sums = torch.cat(parts) if parts else torch.zeros(0)
        for meter, part in zip(
            self.meters.values(), self.sums.split([len(part) for part in parts])
        ):
            meter.sums = part

    def attach(self, training_only: bool = False) -> None:
        """Start to measure forward passes.

        Args:
            training_only (bool): Measure only passes with gradients enabled, since
                a network may also run to make targets or pseudo labels. Defaults to
                False.
        """
        for name, stage in self.stages.items():
            self.meters[name].training_only = training_only
            stage.observer = self.meters[name]

    def detach(self) -> None:
        """Stop measuring."""
        for stage in self.stages.values():
            stage.observer = None

    def gather(self) -> None:
        """Move the sums of all ranks to rank 0, which decides and saves."""
        all_reduce(self.sums)
        if not is_main_process():
            self.sums.zero_()

    def state_dict(self, sums: Optional[Tensor] = None) -> Dict[str, Any]:
        """Sums and settings of the measurement, on the CPU.

        Args:
            sums (Tensor, optional): Earlier :attr:`sums`. Defaults to the current
                ones.

        Returns:
            dict[str, Any]: ``reduction``, ``eps``, ``attentions`` (type, head size
            and state of each, by stage) and ``sums`` (by stage).
        """
        sums = (self.sums if sums is None else sums).cpu()
        sizes = [len(meter.sums) for meter in self.meters.values()]
        return dict(
            reduction=self.reduction,
            eps=self.eps,
            attentions={name: list(m.identity) for name, m in self.meters.items()},
            sums={n: part.clone() for n, part in zip(self.meters, sums.split(sizes))},
        )

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from the sums of :meth:`state_dict`.

        Args:
            state (dict[str, Any]): Result of :meth:`state_dict`.

        Raises:
            ValueError: If the sums come from other settings or attentions.
        """
        current = self.state_dict()
        if 'sums' not in state:  # version 0.1 saved only the sums
            state = dict(current, sums=state)
        for key in ('reduction', 'eps', 'attentions'):
            _check_same(key, state[key], current[key])
        expected, saved = [
            {name: len(sums) for name, sums in part['sums'].items()}
            for part in (current, state)
        ]
        _check_same('numbers', saved, expected)
        for name, sums in state['sums'].items():
            self.meters[name].sums.copy_(sums)

    def compute(self) -> Dict[str, Optional[Divergence]]:
        """KL divergences of all active attentions.

        Returns:
            dict[str, Divergence | None]: The divergences by name, in order; None
            for the first attention of a stage and in stages that have not run.
        """
        return {
            name: value
            for meter in self.meters.values()
            for name, value in meter.compute().items()
        }

    def silent_stages(self) -> List[str]:
        """Names of the stages that have two or more active attentions but never ran.

        Returns:
            list[str]: The names.
        """
        return [
            name
            for name, meter in self.meters.items()
            if len(meter.tokens) > 1 and not meter.sums[-1]
        ]

    def decide(
        self,
        policy: PruningPolicy,
        keep_value: bool = False,
        seed: Union[int, Sequence[int]] = 0,
        **where,
    ) -> PruningDecision:
        """Let a policy decide on the measured divergences.

        Args:
            policy (PruningPolicy): The policy.
            keep_value (bool): Whether pruned attentions keep key and value, see
                :func:`mmela.structure.prune`. Defaults to False.
            seed (int | Sequence[int]): For a policy that chooses at random.
                Defaults to 0.
            **where: ``window``, ``unit``, ``iteration`` and ``put_off`` of the
                decision.

        Returns:
            PruningDecision: The decision. The network is not changed.

        Raises:
            ValueError: If a divergence is NaN or infinite; the error names the
                layer.
        """
        silent = self.silent_stages()
        if silent and not any(meter.sums[-1] for meter in self.meters.values()):
            warnings.warn(
                'nothing was measured, so nothing is pruned: '
                f'{", ".join(silent)} did not run between attach() and detach()',
                stacklevel=2,
            )
        values = self.compute()
        stages = [name for name, meter in self.meters.items() for _ in meter.tokens]
        return PruningDecision(
            policy(values.values(), stages, values, seed),
            policy.config,
            self.reduction,
            self.eps,
            keep_value,
            deviation=deviation(values.values()),
            movement=self._movement(),
            **where,
        )

    def _movement(self) -> Optional[float]:
        """Median of :meth:`~mmela.layers.LayerAttention.movement`."""
        movements = [
            attention.movement()
            for stage in self.stages.values()
            for attention in stage.attentions
            if attention.active
        ]
        known = [value for value in movements if value is not None]
        return median(known) if known else None


def _check_same(key: str, saved, expected) -> None:
    """Compare the settings of a saved measurement with those of this run."""
    if isinstance(expected, dict):
        _check_same(f'{key} of stages', list(saved), list(expected))
        for name in expected:
            _check_same(f'{key} of {name}', saved[name], expected[name])
    elif saved != expected:
        raise ValueError(
            f'the checkpoint was saved during a window with {key}={saved}, but this '
            f'run has {key}={expected}. Resume with the settings that the window '
            'started with, or from a checkpoint outside of the window'
        )
