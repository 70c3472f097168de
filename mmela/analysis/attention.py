"""What the layer attentions of a network do on images."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import write_text
from ..hooks.meter import NetworkKLMeter, check_measurement
from ..layers import AttentionState, LayerAttention
from ..pruning import LayerDecision, PruningPolicy, build_policy
from ..structure import AttentionStage, attention_stages
from .keys import KeyRecorder
from .statistics import RunningMean

BINS = 20


class StageRecorder:
    """Statistics of one stage over the forward passes inside a ``with``.

    Args:
        stage (AttentionStage): The stage.
        meter (callable, optional): Gets the scores too, as an observer of the
            stage does. Defaults to None.

    Attributes:
        maps (list[RunningMean]): Attention weights of each active attention,
            (G, t).
        features (dict[int, RunningMean]): Cosine similarity of a block's
            output, its attention included, with that of the block before, by
            index of the block.
        queries (dict[tuple[int, int], RunningMean]): Absolute cosine
            similarity per head, averaged over the heads, of the queries of two
            consecutive active attentions, by the indices of their blocks.
        histogram (Tensor | None): Counts of those absolute cosine
            similarities in :data:`BINS` equal bins from 0 to 1, (BINS,). The
            query of the first active attention, which attends to itself
            alone, is left out (MRLA, figure 2b).
        keys (KeyRecorder): Of the keys.
    """

    def __init__(self, stage: AttentionStage, meter=None) -> None:
        self.stage = stage
        self.meter = meter
        self.maps: List[RunningMean] = []
        self.features: Dict[int, RunningMean] = {}
        self.queries: Dict[tuple, RunningMean] = {}
        self.histogram: Optional[Tensor] = None
        self._handles: list = []
        self.keys = KeyRecorder([attention for _, attention in stage_blocks(stage)])

    def __enter__(self) -> 'StageRecorder':
        self._observer = self.stage.observer
        self.stage.observer = self._record_scores
        self._feature = self._query = (-1, None)
        active = [
            i
            for i, (_, attention) in enumerate(stage_blocks(self.stage))
            if attention is not None and attention.active
        ]
        self._first = min(active, default=-1)
        for index, (block, attention) in enumerate(stage_blocks(self.stage)):
            # Its attention runs before all other hooks of the block.
            record = partial(self._record_feature, index)
            self._handles.append(block.register_forward_hook(record))
            query = getattr(attention, 'query', None)
            if isinstance(query, nn.Module) and attention.active:
                self._handles.append(
                    query.register_forward_hook(
                        partial(self._record_query, index, attention)
                    )
                )
        self._handles += self.keys.hooks()
        return self

    def __exit__(self, *args) -> None:
        self.stage.observer = self._observer
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._feature = self._query = (-1, None)

    def _record_scores(self, scores: List[Tensor]) -> None:
        if self._observer is not None:
            self._observer(scores)
        if self.meter is not None:
            self.meter(scores)
        self.keys.finish()
        if not self.maps:
            self.maps = [RunningMean() for _ in scores]
        for mean, score in zip(self.maps, scores):
            weights = score.double().softmax(-1)
            # Positions are averaged for each image, as their number may vary
            mean.add(weights.flatten(2, -2).mean(2) if score.dim() > 3 else weights)

    def _record_feature(
        self, index: int, module: nn.Module, args: tuple, output: Any
    ) -> None:
        attention = getattr(module, 'layer_attn', None) or self.stage.attentions[0]
        feature = attention.place.features.get(output).detach()
        (last, before), self._feature = self._feature, (index, feature)
        # Otherwise it is of another forward pass.
        if last == index - 1 >= 0 and before.shape == feature.shape:
            cosine = F.cosine_similarity(
                before.flatten(1).float(), feature.flatten(1).float()
            )
            self.features.setdefault(index, RunningMean()).add(cosine)

    def _record_query(
        self,
        index: int,
        attention: nn.Module,
        module: nn.Module,
        args: tuple,
        output: Tensor,
    ) -> None:
        if output[0].numel() != attention.channels:
            return
        query = (
            output.detach()
            .float()
            .view(len(output), attention.num_heads, attention.head_dim)
        )
        (last, before), self._query = self._query, (index, query)
        if not 0 <= last < index:
            return
        cosine = F.cosine_similarity(before, query, dim=-1).abs()
        self.queries.setdefault((last, index), RunningMean()).add(cosine.mean(1))
        if last != self._first:
            bins = (cosine * BINS).long().clamp(max=BINS - 1)
            counts = torch.bincount(bins.flatten(), minlength=BINS)
            self.histogram = (
                counts if self.histogram is None else self.histogram + counts
            )


def stage_blocks(
    stage: AttentionStage,
) -> List[Tuple[nn.Module, Optional[LayerAttention]]]:
    """Blocks of a stage and their attentions.

    Args:
        stage (AttentionStage): A stage.

    Returns:
        list[tuple[nn.Module, LayerAttention | None]]: In order.
    """
    return [
        (block, getattr(block, 'layer_attn', None)) for block in stage.blocks.values()
    ]


def effective_contributions(lambdas: Sequence[Tensor]) -> Tensor:
    r"""Weights that a recurrence leaves to the earlier of its terms.

    Unrolling :math:`O^t = \lambda^t \odot O^{t-1} + V^t`, the term of layer
    ``s`` enters the last output with :math:`\prod_{i > s} \lambda^i`, whose
    absolute value this gives (KCLA, section III-B and figure 4).

    Args:
        lambdas (Sequence[Tensor]): :math:`\lambda^t` of ``T`` layers in order,
            each (C,). The first is not used.

    Returns:
        Tensor: (T, C); the last row is 1.
    """
    rows = [torch.ones_like(lambdas[0])]
    for vector in reversed(lambdas[1:]):
        rows.append(rows[-1] * vector.abs())
    return torch.stack(rows[::-1])


def run_backbone(model: nn.Module, batch: dict) -> None:
    """Have a batch of data pass the layer attentions of a model.

    Necks and heads are left out where the model allows it.

    Args:
        model (nn.Module): A model of an mmengine project.
        batch (dict): What its data loader yields.
    """
    if hasattr(model, 'backbone') and all(
        name.startswith('backbone.') for name in attention_stages(model)
    ):
        inputs = model.data_preprocessor(batch, False)['inputs']
        if isinstance(inputs, Tensor):
            model.backbone(inputs)
            return
    model.test_step(batch)


def hook_settings(cfg: dict) -> dict:
    """What a config tells the pruning hook about measuring and deciding.

    Args:
        cfg (dict): Config of a run, with or without the hook.

    Returns:
        dict: ``policy``, ``reduction`` and ``eps``, with the hook's defaults
        where the config has none; ``source`` says which of both it is.
    """
    settings = dict(
        policy=dict(type='EBQM'),
        reduction='mean_kl',
        eps=1e-8,
        source='the default of the hook',
    )
    for hook in cfg.get('custom_hooks') or []:
        if str(hook.get('type')).endswith('LayerAttentionPruningHook'):
            settings['source'] = 'custom_hooks of the config'
            for key in ('policy', 'reduction', 'eps'):
                if hook.get(key) is not None:
                    settings[key] = hook[key]
    settings['policy'] = dict(settings['policy'])
    return settings


@torch.no_grad()
def measure_attention(
    model: nn.Module,
    batches: Iterable[dict],
    policy: Optional[dict] = None,
    reduction: str = 'mean_kl',
    eps: float = 1e-8,
) -> dict:
    """Measure what the layer attentions of a model do on images.

    Nothing but means is kept, so the number of images does not matter. The
    model is put into evaluation mode and nothing else in it is changed.

    Args:
        model (nn.Module): A model with layer attentions, pruned or not.
        batches (Iterable[dict]): Batches as its data loader yields them, on
            any device.
        policy (dict, optional): Config of the pruning policy that shall judge
            the divergences. Defaults to None, which means
            ``dict(type='EBQM')``.
        reduction (str): How divergences are averaged, see
            :class:`~mmela.hooks.KLMeter`. Defaults to ``'mean_kl'``.
        eps (float): See :class:`~mmela.hooks.KLMeter`. Defaults to 1e-8.

    Returns:
        dict: Plain values, which JSON can hold:

        - ``images`` (int): Images measured.
        - ``stages`` (dict[str, dict]): Per stage the ``attention`` (name of
          the class), ``states`` of the blocks (``'active'``, ``'value_only'``,
          ``'pruned'``, ``'none'`` for a block without attention), ``maps``,
          ``features``, ``queries``, ``contributions``, ``keys`` and ``scores``
          (see :class:`~mmela.analysis.keys.KeyRecorder`), each None where it
          does not apply.
        - ``histogram`` (list[int] | None): See
          :attr:`StageRecorder.histogram`, over all stages.
        - ``decision`` (dict | None): What the policy would decide now, as of
          :meth:`~mmela.pruning.PruningDecision.to_dict`; what is pruned
          already is among its layers, without a divergence.
        - ``left_out`` (list[str]): What does not apply and why.

    Raises:
        ValueError: If the model has no layer attention, there is no image, or
            the policy, the reduction or ``eps`` is unknown or out of range.
    """
    stages = attention_stages(model)
    if not stages:
        raise ValueError('the network has no layer attention')
    judge = build_policy(policy)
    check_measurement(reduction, eps)
    distributions = {
        name: stage
        for name, stage in stages.items()
        if all(a.prunable for a in stage.attentions)
    }
    meter = NetworkKLMeter(distributions, reduction, eps) if distributions else None
    recorders = {
        name: StageRecorder(stage, meter and meter.meters.get(name))
        for name, stage in stages.items()
    }
    model.eval()
    images = 0
    try:
        for recorder in recorders.values():
            recorder.__enter__()
        for batch in batches:
            run_backbone(model, batch)
            images += len(batch['inputs'])
    finally:
        for recorder in recorders.values():
            recorder.__exit__()
    if not images:
        raise ValueError('there is no image to measure on')

    counts = [r.histogram.cpu() for r in recorders.values() if r.histogram is not None]
    result = dict(
        images=images,
        stages={name: _describe(recorder) for name, recorder in recorders.items()},
        histogram=sum(counts).tolist() if counts else None,
        decision=None,
        left_out=[],
    )
    if meter is not None:
        result['decision'] = _judge(meter, judge, result['left_out'])
    result['left_out'] += _left_out(result['stages'])
    return result


def save_measurement(
    folder: Path,
    config: Union[str, Path],
    checkpoint: Union[str, Path],
    data: str,
    result: dict,
) -> dict:
    """Write what was measured where the report looks for it.

    Args:
        folder (Path): Folder for ``layer_attention.json``, which is made.
        config (str | Path): Config of the network.
        checkpoint (str | Path): Its checkpoint.
        data (str): What the images are, in words.
        result (dict): Of :func:`measure_attention`.

    Returns:
        dict: What was written.
    """
    content = dict(
        format=2,
        config=Path(config).name,
        checkpoint=Path(checkpoint).name,
        data=data,
        **result,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / 'layer_attention.json', json.dumps(content, indent=1))
    return content


def _describe(recorder: StageRecorder) -> dict:
    """Statistics of a stage as plain values."""
    stage = recorder.stage
    states = [
        'none' if attention is None else attention.attention_state.name.lower()
        for _, attention in stage_blocks(stage)
    ]
    return dict(
        attention=type(stage.attentions[0]).__name__,
        prunable=all(a.prunable for a in stage.attentions),
        heads=stage.attentions[0].num_heads,
        states=states,
        maps=_maps(recorder.maps, states),
        features=[
            dict(
                blocks=[index - 1, index],
                mean=float(mean.mean()),
                std=float(mean.std()),
            )
            for index, mean in sorted(recorder.features.items())
        ]
        or None,
        queries=[
            dict(blocks=list(blocks), mean=float(mean.mean()), std=float(mean.std()))
            for blocks, mean in sorted(recorder.queries.items())
        ]
        or None,
        contributions=_contributions(stage),
        keys=recorder.keys.describe_keys(),
        scores=recorder.keys.describe_scores(),
    )


def _maps(means: List[RunningMean], states: List[str]) -> Optional[dict]:
    """Attention weights placed at the blocks that they are of.

    Returns:
        dict | None: ``mean``, T lists of T weights, and ``heads``, G such
        maps; None stands where there is no weight.
    """
    active = [i for i, state in enumerate(states) if state == 'active']
    if not means or len(means) != len(active):
        return None
    seen = [i for i, s in enumerate(states) if s in ('active', 'value_only')]
    heads = len(means[0].sums[0])
    maps = [[[None] * len(states) for _ in states] for _ in range(heads + 1)]
    for row, mean in zip(active, means):
        weights = mean.mean()
        columns = [i for i in seen if i <= row]
        if weights.shape[-1] != len(columns):
            return None
        for target, values in zip(maps, [weights.mean(0), *weights]):
            for column, value in zip(columns, values.tolist()):
                target[row][column] = value
    return dict(mean=maps[0], heads=maps[1:])


def _contributions(stage: AttentionStage) -> Optional[dict]:
    """Of a recurrence with ``lambda_o``, see effective_contributions."""
    found = [
        (index, attention)
        for index, (_, attention) in enumerate(stage_blocks(stage))
        if attention is not None
        and attention.active
        and isinstance(getattr(attention, 'lambda_o', None), Tensor)
    ]
    if not found:
        return None
    weights = effective_contributions(
        [a.lambda_o.detach().double().cpu() for _, a in found]
    )
    return dict(
        blocks=[index for index, _ in found],
        mean=weights.mean(1).tolist(),
        std=weights.std(1, unbiased=False).tolist(),
        previous=getattr(found[0][1], 'previous', None),
    )


def _judge(
    meter: NetworkKLMeter, policy: PruningPolicy, left_out: List[str]
) -> Optional[dict]:
    """What the policy makes of the divergences, and what is pruned already."""
    try:
        decision = meter.decide(policy)
    except ValueError as error:
        left_out.append(f'KL divergence and policy: {error}')
        return None
    if all(layer.mapped is None for layer in decision.layers):
        left_out.append(
            'curve of the policy: it maps no divergence, which '
            'takes at least two different ones up to the quantile '
            'and a policy with a mapping'
        )
    known = {layer.name: layer for layer in decision.layers}
    reasons = {
        AttentionState.VALUE_ONLY: '✕ pruned before, key and value stay',
        AttentionState.PRUNED: '✕ pruned before',
    }
    layers = []
    for stage_name, stage in meter.stages.items():
        for name, attention in stage.named.items():
            gone = reasons.get(attention.attention_state, '')
            layers.append(
                known.get(name) or LayerDecision(name, stage_name, reason=gone)
            )
    return replace(decision, layers=tuple(layers)).to_dict()


def _left_out(stages: Dict[str, dict]) -> List[str]:
    """Say what does not apply to a network and why."""
    notes = []
    for name, stage in stages.items():
        kind = stage['attention']
        if not stage['prunable'] and stage['scores'] is None:
            notes.append(
                f'attention maps, KL divergence and policy of {name}: {kind} '
                'weighs no layers against each other by a distribution'
            )
        elif stage['scores'] is not None:
            notes.append(
                f'KL divergence and policy of {name}: {kind} weighs by the norms of '
                'the keys alone, and the pruning hook does not measure that'
            )
        elif stage['maps'] is None:
            notes.append(f'attention maps of {name}: no attention is active')
        if stage['queries'] is None:
            notes.append(
                f'similarity of queries of {name}: there are no two active '
                'attentions with a query of one vector per head'
            )
        if stage['keys'] is None:
            notes.append(
                f'similarity of keys of {name}: there are no two blocks with a key '
                'of one vector per head'
            )
        if stage['features'] is None:
            notes.append(
                f'similarity of features of {name}: there are no two '
                'blocks with outputs of one shape'
            )
        if stage['contributions'] is None:
            notes.append(
                f'effective contributions of {name}: {kind} has no active '
                'recurrence with lambda_o, as MRLALight has'
            )
    return _merge_stages(notes, stages)


def _merge_stages(notes: List[str], stages: Dict[str, dict]) -> List[str]:
    """Say once what holds for all stages."""
    merged: Dict[str, int] = {}
    plain = {}
    for note in notes:
        general = note
        for name in stages:
            general = general.replace(f' of {name}:', ':')
        merged[general] = merged.get(general, 0) + 1
        plain.setdefault(general, []).append(note)
    result = []
    for general, count in merged.items():
        result += [general] if count == len(stages) else plain[general]
    return result
