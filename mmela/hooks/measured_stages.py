from logging import Logger
from typing import Dict, Iterable

from mmengine.model import is_model_wrapper
from torch import nn

from ..structure import (
    AttentionStage,
    attention_stages,
    layer_attentions,
    trained_stages,
)


def candidate_stages(
    model: nn.Module, followers: Dict[str, str]
) -> Dict[str, AttentionStage]:
    """Find the stages that can be measured and pruned, trained or not.

    Args:
        model (nn.Module): The model of a run, wrapped or not.
        followers (dict[str, str]): Names of modules that copy the structure of
            another, mapped to the name of that one.

    Returns:
        dict[str, AttentionStage]: The stages by name, without those of followers.

    Raises:
        ValueError: If there is no such stage.
    """
    stages = attention_stages(model)
    candidates = {
        name: stage
        for name, stage in stages.items()
        if all(attention.prunable for attention in stage.attentions)
        and not any(_within(name, follower) for follower in followers)
    }
    if not candidates:
        attentions = [a for stage in stages.values() for a in stage.attentions]
        kinds = ', '.join(sorted({type(a).__name__ for a in attentions})) or 'none'
        if any(attention.prunable for attention in attentions):
            kinds += ', but only in followers or in stages that mix attentions'
        raise ValueError(
            'LayerAttentionPruningHook needs a backbone with a prunable layer '
            'attention, one that computes a distribution over layers, such as '
            f'MRLABase; found: {kinds}. Use for example '
            "backbone=dict(type='ELAResNet', layer_attention=dict(type='MRLABase')). "
            'With zero_init or small_init, stages that the backbone freezes get no '
            'attention: check frozen_stages'
        )
    return candidates


def measured_stages(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    followers: Dict[str, str],
    logger: Logger,
) -> Dict[str, AttentionStage]:
    """Choose the stages of a model to measure and prune.

    Args:
        model (nn.Module): The model of a run, wrapped or not.
        parameters (Iterable[nn.Parameter]): Parameters that the optimizer holds.
        followers (dict[str, str]): Names of modules that copy the structure of
            another, mapped to the name of that one.
        logger (Logger): Logs which networks are skipped, and warns if no stage has
            more than two active attentions.

    Returns:
        dict[str, AttentionStage]: Stages, by name, of networks that are trained now
        and are not followers; empty if all of these are frozen.

    Raises:
        ValueError: If no stage can be measured, if all trained networks are
            followers, or if a module cannot follow another.
    """
    if is_model_wrapper(model):
        model = model.module
    candidates = candidate_stages(model, followers)
    stages = attention_stages(model)
    trained = trained_stages(model, parameters)
    measured = {name: stage for name, stage in candidates.items() if name in trained}
    following = [n for n in trained if any(_within(n, f) for f in followers)]
    if following and not measured:
        raise ValueError(
            f'followers: {following[0]} is trained but follows another module, and '
            f'every trained network is a follower; got followers={followers}. Let '
            'followers follow the trained network'
        )
    if not measured:
        logger.warning(
            'All networks with prunable layer attentions are frozen now. The hook '
            'checks again when a window opens.'
        )
        return {}
    for follower, module in followers.items():
        _check_follower(model, follower, module, measured)
    active = [sum(a.active for a in stage.attentions) for stage in measured.values()]
    if max(active) <= 2:
        logger.warning(
            'No stage has more than two active layer attentions. The first attention '
            'of a stage sees only its own block, so the divergence of the second one '
            'does not show whether it is redundant. Use pruning for networks with '
            'three or more blocks in a stage, such as ResNet-50.'
        )
    frozen = {
        stage.network or 'the model'
        for name, stage in stages.items()
        if name not in trained and not any(_within(name, f) for f in followers)
    }
    for name in sorted(frozen):
        logger.info(
            f'{name} is not trained, so its layer attentions are neither measured nor '
            'pruned. To copy the structure of another module, set followers.'
        )
    return measured


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + '.')


def _check_follower(
    model: nn.Module, follower: str, module: str, measured: Iterable[str]
) -> None:
    """Check that a module can copy the structure of another."""
    named = dict(model.named_modules())
    for name in (follower, module):
        if not name or name not in named:
            raise ValueError(
                f'followers: the model has no module {name!r}; it has '
                + ', '.join(n for n, _ in model.named_children())
            )
    if not any(_within(name, module) for name in measured):
        raise ValueError(
            f'followers: {follower} cannot follow {module}, because no layer '
            f'attention is measured in {module}'
        )
    actual, expected = [
        {
            name: (type(attention).__name__, attention.attention_state.name)
            for name, attention in layer_attentions(named[part]).items()
        }
        for part in (follower, module)
    ]
    for name in sorted({*actual, *expected}):
        if actual.get(name) != expected.get(name):
            raise ValueError(
                f'followers: {follower} cannot follow {module}: {name} is '
                f'{actual.get(name, "missing")} in {follower}, but '
                f'{expected.get(name, "missing")} in {module}'
            )
