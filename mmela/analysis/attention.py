"""Measure the layer attentions of a network on images."""

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
    """Statistics of one stage over the forward passes inside a ``with`` block.

    Args:
        stage (AttentionStage): The stage.
        meter (callable, optional): Further observer that gets the scores. Defaults
            to None.

    Attributes:
        maps (list[RunningMean]): Attention weights of each active attention,
            (G, t).
        features (dict[int, RunningMean]): Cosine similarity between the outputs of
            a block and of the previous one, with attention, by index of the block.
        queries (dict[tuple[int, int], RunningMean]): Absolute cosine similarity
            between the queries of two consecutive active attentions, averaged over
            heads, by the indices of their blocks.
        histogram (Tensor | None): Counts of these similarities in :data:`BINS` equal
            bins from 0 to 1, (BINS,). It leaves out the first active attention,
            which only attends to itself (MRLA, figure 2b).
        keys (KeyRecorder): Statistics of the keys.
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
            # The attention of a block runs before its other hooks
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
        # Otherwise it belongs to another forward pass
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
    """List the blocks of a stage with their attentions.

    Args:
        stage (AttentionStage): A stage.

    Returns:
        list[tuple[nn.Module, LayerAttention | None]]: The blocks in order.
    """
    return [
        (block, getattr(block, 'layer_attn', None)) for block in stage.blocks.values()
    ]


def effective_contributions(lambdas: Sequence[Tensor]) -> Tensor:
    r"""Compute the final weights of the terms of a recurrence.

    If :math:`O^t = \lambda^t \odot O^{t-1} + V^t` is unrolled, the term of layer ``s``
    enters the last output with the weight :math:`\prod_{i > s} \lambda^i`. This
    function returns its absolute value (KCLA, section III-B and figure 4).

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
    """Run a batch through the layer attentions of a model.

    Necks and heads are skipped if possible.

    Args:
        model (nn.Module): A model of an mmengine project.
        batch (dict): A batch from its data loader.
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
    """Read the settings of the pruning hook from a config.

    Args:
        cfg (dict): Config of a run, with or without the hook.

    Returns:
        dict: ``policy``, ``reduction`` and ``eps``, with the hook's defaults for
        missing ones, and ``source``, a description of where they come from.
    """
    settings = dict(
        policy=dict(type='EBQM'),
        reduction='mean_kl',
        eps=1e-8,
        source='the defaults of the hook',
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
    """Measure the layer attentions of a model on images.

    It keeps only means, so memory does not depend on the number of images. It sets the
    model to eval mode and changes nothing else.

    Args:
        model (nn.Module): A model with layer attentions, pruned or not.
        batches (Iterable[dict]): Batches from its data loader, on any device.
        policy (dict, optional): Config of the pruning policy for the divergences.
            Defaults to None, which means ``dict(type='EBQM')``.
        reduction (str): How to average divergences, see
            :class:`~mmela.hooks.KLMeter`. Defaults to ``'mean_kl'``.
        eps (float): See :class:`~mmela.hooks.KLMeter`. Defaults to 1e-8.

    Returns:
        dict: Plain values for JSON:

        - ``images`` (int): Number of images.
        - ``stages`` (dict[str, dict]): For each stage, the ``attention`` (name of
          the class), the ``states`` of its blocks (``'active'``, ``'value_only'``,
          ``'pruned'``, or ``'none'`` for a block without attention), ``maps``,
          ``features``, ``queries``, ``contributions``, ``keys`` and ``scores``
          (see :class:`~mmela.analysis.keys.KeyRecorder`); None where not
          applicable.
        - ``histogram`` (list[int] | None): :attr:`StageRecorder.histogram` over all
          stages.
        - ``decision`` (dict | None): What the policy would decide now, see
          :meth:`~mmela.pruning.PruningDecision.to_dict`. Its layers include
          attentions that are already pruned, without a divergence.
        - ``left_out`` (list[str]): What is not applicable, and why.

    Raises:
        ValueError: If the model has no layer attention, if there is no image, or
            if the policy, ``reduction`` or ``eps`` is unknown or out of range.
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
        raise ValueError('there are no images to measure on')

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
    """Write a measurement to ``layer_attention.json``, which the report reads.

    Args:
        folder (Path): Folder of the file, which is created if needed.
        config (str | Path): Config of the network.
        checkpoint (str | Path): Its checkpoint.
        data (str): Description of the images.
        result (dict): Result of :func:`measure_attention`.

    Returns:
        dict: The content of the file.
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
    """Arrange attention weights by block.

    Returns:
        dict | None: ``mean``, T lists of T weights, and ``heads``, G such maps, with
        None for a missing weight.
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
    """Contributions in a recurrence with ``lambda_o``, see effective_contributions."""
    recurrent = [
        (index, attention)
        for index, (_, attention) in enumerate(stage_blocks(stage))
        if attention is not None
        and attention.active
        and isinstance(getattr(attention, 'lambda_o', None), Tensor)
    ]
    if not recurrent:
        return None
    weights = effective_contributions(
        [a.lambda_o.detach().double().cpu() for _, a in recurrent]
    )
    return dict(
        blocks=[index for index, _ in recurrent],
        mean=weights.mean(1).tolist(),
        std=weights.std(1, unbiased=False).tolist(),
        previous=getattr(recurrent[0][1], 'previous', None),
    )


def _judge(
    meter: NetworkKLMeter, policy: PruningPolicy, left_out: List[str]
) -> Optional[dict]:
    """Decide by the policy, and add attentions that are already pruned."""
    try:
        decision = meter.decide(policy)
    except ValueError as error:
        left_out.append(f'KL divergence and policy: {error}')
        return None
    if all(layer.mapped is None for layer in decision.layers):
        left_out.append(
            'curve of the policy: no divergence is mapped; that needs a policy with a '
            'mapping and at least two different divergences up to the quantile'
        )
    known = {layer.name: layer for layer in decision.layers}
    reasons = {
        AttentionState.VALUE_ONLY: '✕ already pruned, key and value stay',
        AttentionState.PRUNED: '✕ already pruned',
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
    """Explain what is not applicable to a network."""
    notes = []
    for name, stage in stages.items():
        kind = stage['attention']
        if not stage['prunable'] and stage['scores'] is None:
            notes.append(
                f'attention maps, KL divergence and policy of {name}: {kind} '
                'computes no distribution over layers'
            )
        elif stage['scores'] is not None:
            notes.append(
                f'KL divergence and policy of {name}: {kind} weighs layers only by the '
                'norms of their keys, which the pruning hook does not measure'
            )
        elif stage['maps'] is None:
            notes.append(f'attention maps of {name}: no attention is active')
        if stage['queries'] is None:
            notes.append(
                f'similarity of queries of {name}: this needs two active attentions '
                'with one query vector per head'
            )
        if stage['keys'] is None:
            notes.append(
                f'similarity of keys of {name}: this needs two blocks with one key '
                'vector per head'
            )
        if stage['features'] is None:
            notes.append(
                f'similarity of features of {name}: this needs two blocks whose '
                'outputs have the same shape'
            )
        if stage['contributions'] is None:
            notes.append(
                f'effective contributions of {name}: this needs an active recurrence '
                f'with lambda_o, such as MRLALight, but the attention is {kind}'
            )
    return _merge_stages(notes, stages)


def _merge_stages(notes: List[str], stages: Dict[str, dict]) -> List[str]:
    """Merge notes that apply to all stages."""
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
