from typing import Dict, List, Optional

import torch
from torch import Tensor

from ..layers import AttentionStage, AttentionState
from ..pruning import attention_kl, safe_log

REDUCTIONS = ('mean_kl', 'mean_distribution')


class KLMeter:
    """Accumulates the redundancy of a stage's attentions over many batches.

    It is the observer of a :class:`~mmela.layers.AttentionStage`. The
    sums stay on the device in double precision; only :meth:`compute` waits for
    them.

    Args:
        stage (AttentionStage): The stage to measure. Its active
            attentions must stay the same for the life of the meter.
        reduction (str): ``'mean_kl'`` takes the KL divergence per sample and
            head and then its mean; ``'mean_distribution'`` takes the KL
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
        # Tokens that each active attention attends over
        self.tokens: List[int] = []
        seen = 0
        device = torch.device('cpu')
        for attention in stage.attentions:
            seen += attention.attention_state != AttentionState.PRUNED
            if attention.active:
                self.tokens.append(seen)
            device = attention.state.device
        size = (
            sum(self.tokens)
            if reduction == 'mean_distribution'
            else max(len(self.tokens) - 1, 0)
        )
        # The last element counts the distributions, samples times heads, that
        # the others are sums over. One tensor means one reduction over ranks.
        self.sums = torch.zeros(size + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def __call__(self, scores: List[Tensor]) -> None:
        """Add a batch.

        Args:
            scores (list[Tensor]): Scores before the softmax of the active
                attentions, each (B, G, t).
        """
        if len(scores) < 2:
            return
        log_probs = [score.double().log_softmax(-1) for score in scores]
        if self.reduction == 'mean_distribution':
            sums = [log_p.exp().sum((0, 1)) for log_p in log_probs]
        else:
            sums = [
                attention_kl(log_p, log_q, self.eps).sum()[None]
                for log_p, log_q in zip(log_probs, log_probs[1:])
            ]
        count = scores[0].new_full((1,), scores[0][..., 0].numel())
        self.sums += torch.cat([*sums, count.double()])

    def compute(self) -> List[float]:
        """KL divergence of each active attention from its predecessor.

        Returns:
            list[float]: One value per active attention but the first; NaN
            where nothing was measured.
        """
        sums, count = self.sums[:-1].cpu(), self.sums[-1].cpu()
        if self.reduction == 'mean_kl':
            return (sums / count).tolist()
        log_probs = [safe_log(part) for part in (sums / count).split(self.tokens)]
        return [
            float(attention_kl(log_p, log_q, self.eps))
            for log_p, log_q in zip(log_probs, log_probs[1:])
        ]


class NetworkKLMeter:
    """A :class:`KLMeter` for each stage of a network.

    Args:
        stages (dict[str, AttentionStage]): The stages by name.
        reduction (str): See :class:`KLMeter`.
        eps (float): See :class:`KLMeter`.
    """

    def __init__(
        self, stages: Dict[str, AttentionStage], reduction: str, eps: float
    ) -> None:
        self.stages = stages
        self.meters = {
            name: KLMeter(stage, reduction, eps) for name, stage in stages.items()
        }

    def attach(self) -> None:
        """Measure the forward passes from now on."""
        for name, stage in self.stages.items():
            stage.observer = self.meters[name]

    def detach(self) -> None:
        """Measure no longer."""
        for stage in self.stages.values():
            stage.observer = None

    def reset(self) -> None:
        """Forget all measurements."""
        for meter in self.meters.values():
            meter.sums.zero_()

    def state_dict(self) -> Dict[str, Tensor]:
        """Sums of each stage, on the CPU."""
        return {name: meter.sums.cpu().clone() for name, meter in self.meters.items()}

    def load_state_dict(self, state: Dict[str, Tensor]) -> None:
        """Continue from the sums of :meth:`state_dict`.

        Raises:
            ValueError: If they were taken on other stages or attentions.
        """
        sizes = {name: m.sums.numel() for name, m in self.meters.items()}
        found = {name: sums.numel() for name, sums in state.items()}
        if sizes != found:
            raise ValueError(
                'the checkpoint measured other layer attentions '
                f'({found}) than this network has ({sizes})'
            )
        for name, sums in state.items():
            self.meters[name].sums.copy_(sums)

    def compute(self) -> Dict[str, List[Optional[float]]]:
        """KL divergences of each stage's active attentions.

        Returns:
            dict[str, list[float | None]]: By stage; the first active attention
            of a stage has None.
        """
        return {
            name: [None, *meter.compute()][: len(meter.tokens)]
            for name, meter in self.meters.items()
        }
