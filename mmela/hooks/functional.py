from typing import Dict, List, Optional, Sequence

from mmengine.model import is_model_wrapper
from torch import nn

from ..layers import AttentionState, LayerAttention, LayerAttentionStage
from ..pruning import PruningPolicy


def layer_attention_stages(model: nn.Module) -> Dict[str, LayerAttentionStage]:
    """Stages of a model that have layer attentions.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        dict[str, LayerAttentionStage]: By name, in the order of the forward
        pass, e.g. ``backbone.layer1``.
    """
    if is_model_wrapper(model):
        model = model.module
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LayerAttentionStage) and module.attentions
    }


def named_layer_attentions(model: nn.Module) -> Dict[str, LayerAttention]:
    """Layer attentions of a model.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        dict[str, LayerAttention]: By name, in the order of the forward pass,
        e.g. ``backbone.layer1.0.layer_attn``.
    """
    return {
        f'{stage_name}.{name}.layer_attn': block.layer_attn
        for stage_name, stage in layer_attention_stages(model).items()
        for name, block in stage.named_children()
        if hasattr(block, 'layer_attn')
    }


def active_names(stage_name: str, stage: LayerAttentionStage) -> List[str]:
    """Names of the active layer attentions of a stage.

    Args:
        stage_name (str): Name of the stage.
        stage (LayerAttentionStage): The stage.

    Returns:
        list[str]: As of :func:`named_layer_attentions`, in order.
    """
    return [
        f'{stage_name}.{name}.layer_attn'
        for name, block in stage.named_children()
        if hasattr(block, 'layer_attn') and block.layer_attn.active
    ]


def decide(
    stages: Dict[str, LayerAttentionStage],
    kl: Dict[str, List[Optional[float]]],
    policy: PruningPolicy,
) -> List[dict]:
    """Have a policy decide which active attentions are redundant.

    Args:
        stages (dict[str, LayerAttentionStage]): The stages by name.
        kl (dict[str, list[float | None]]): KL divergence of each active
            attention of each stage; None for the first.
        policy (PruningPolicy): The policy.

    Returns:
        list[dict]: For each active attention ``name``, ``stage``, ``kl``,
        ``normalized``, ``mapped``, ``threshold``, ``skip`` and ``reason``.

    Raises:
        ValueError: If a divergence is NaN or infinite; it names the layer.
    """
    names, indices, values = [], [], []
    for index, (stage_name, stage) in enumerate(stages.items()):
        names += active_names(stage_name, stage)
        indices += [index] * len(kl[stage_name])
        values += kl[stage_name]
    decision = policy(
        [float('nan') if value is None else value for value in values],
        stages=indices,
        measured=[value is not None for value in values],
        names=names,
    )
    stage_names = list(stages)
    return [
        dict(row, stage=stage_names[index])
        for row, index in zip(decision.rows(), indices)
    ]


def prune(model: nn.Module, names: Sequence[str], keep_value: bool = False) -> None:
    """Prune layer attentions of a model. What is gone stays gone.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.
        names (Sequence[str]): Names as of :func:`named_layer_attentions`.
        keep_value (bool): Let later attentions still see the key and value.
            What no later attention of the stage would see goes all the same:
            its parameters would get no gradient, which distributed training
            waits for. Defaults to False.

    Raises:
        KeyError: If there is no layer attention of a name.
    """
    attentions = named_layer_attentions(model)
    state = AttentionState.VALUE_ONLY if keep_value else AttentionState.PRUNED
    for name in names:
        attention = attentions[name]
        attention.attention_state = max(attention.attention_state, state)
    for stage in layer_attention_stages(model).values():
        for attention in reversed(stage.attentions):
            if attention.active:
                break
            attention.attention_state = AttentionState.PRUNED
