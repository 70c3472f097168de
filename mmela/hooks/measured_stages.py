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
    """Stages of a model that can be measured and pruned, whether trained or not.

    Args:
        model (nn.Module): The model of a run, wrapped or not.
        followers (dict[str, str]): By name of a module that gets the
            structure of another, the name of that one.

    Returns:
        dict[str, AttentionStage]: The stages by name, of networks that follow none.

    Raises:
        ValueError: If there is none.
    """
    stages = attention_stages(model)
    found = {
        name: stage
        for name, stage in stages.items()
        if all(attention.prunable for attention in stage.attentions)
        and not any(_within(name, follower) for follower in followers)
    }
    if not found:
        attentions = [a for stage in stages.values() for a in stage.attentions]
        kinds = ', '.join(sorted({type(a).__name__ for a in attentions})) or 'none'
        if any(attention.prunable for attention in attentions):
            kinds += ', but in no network that follows none'
        raise ValueError(
            'LayerAttentionPruningHook needs a backbone with a prunable '
            'layer attention, one that weighs layers by a distribution '
            f'such as MRLABase; found: {kinds}. Use e.g. '
            "backbone=dict(type='ELAResNet', "
            "layer_attention=dict(type='MRLABase'))"
        )
    return found


def measured_stages(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    followers: Dict[str, str],
    logger: Logger,
) -> Dict[str, AttentionStage]:
    """Choose the stages of a model that are measured and pruned.

    Args:
        model (nn.Module): The model of a run, wrapped or not.
        parameters (Iterable[nn.Parameter]): What the optimizer holds.
        followers (dict[str, str]): By name of a module that gets the
            structure of another, the name of that one.
        logger (Logger): Is told which networks are left alone, and where no
            stage has two attentions to compare.

    Returns:
        dict[str, AttentionStage]: The stages by name, of networks that are
        trained now and follow none; empty where all of them are frozen.

    Raises:
        ValueError: If there is none, trained or not, if all that are trained follow
            others, or if a module cannot follow another.
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
            f'followers: {following[0]} is trained but follows another module, and no '
            f'network that follows none is trained; got followers={followers}'
        )
    if not measured:
        logger.warning(
            'All networks with prunable layer attentions are frozen now: none of their '
            'parameters is trained. That is judged again when a window opens.'
        )
        return {}
    for follower, module in followers.items():
        _check_follower(model, follower, module, measured)
    active = [sum(a.active for a in stage.attentions) for stage in measured.values()]
    if max(active) <= 2:
        logger.warning(
            'No stage has more than two active layer attentions. The second of a '
            'stage is compared with the first, which sees its own block alone: its '
            'divergence tells how much it looks at its own block, and not whether it '
            'repeats another. Stages of three and more blocks are what pruning is '
            'for, as in ResNet-50.'
        )
    frozen = {
        stage.network or 'the model'
        for name, stage in stages.items()
        if name not in trained and not any(_within(name, f) for f in followers)
    }
    for name in sorted(frozen):
        logger.info(
            f'{name} is not trained: its layer attentions are neither measured nor '
            'pruned. To give it the structure of another module, use followers.'
        )
    return measured


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + '.')


def _check_follower(
    model: nn.Module, follower: str, module: str, measured: Iterable[str]
) -> None:
    """Check that a module can get the structure of another."""
    named = dict(model.named_modules())
    for name in (follower, module):
        if not name or name not in named:
            raise ValueError(
                f'followers: the model has no module {name!r}; it has '
                + ', '.join(n for n, _ in model.named_children())
            )
    if not any(_within(name, module) for name in measured):
        raise ValueError(
            f'followers: {follower} cannot follow {module}, in which no layer '
            'attention is measured'
        )
    found, expected = [
        {
            name: (type(attention).__name__, attention.attention_state.name)
            for name, attention in layer_attentions(named[part]).items()
        }
        for part in (follower, module)
    ]
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f'{follower} cannot follow {module}: {name} is '
                f'{found.get(name, "missing")} in the one and '
                f'{expected.get(name, "missing")} in the other'
            )
