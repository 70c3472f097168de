"""The layer attentions of a model: where they are, and pruning them."""

from typing import Dict, Iterable, Sequence

from mmengine.model import is_model_wrapper
from torch import nn

from .layers import AttentionStage, AttentionState, LayerAttention


def attention_stages(model: nn.Module) -> Dict[str, AttentionStage]:
    """Stages of a model that have layer attentions.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        dict[str, AttentionStage]: By name, in the order of the forward pass,
        e.g. ``backbone.layer1``.
    """
    if is_model_wrapper(model):
        model = model.module
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AttentionStage) and module.attentions
    }


def layer_attentions(model: nn.Module) -> Dict[str, LayerAttention]:
    """Layer attentions of a model, pruned ones too.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        dict[str, LayerAttention]: By name, in the order of the forward pass,
        e.g. ``backbone.layer1.0.layer_attn``.
    """
    return {
        f'{stage_name}.{name}' if stage_name else name: attention
        for stage_name, stage in attention_stages(model).items()
        for name, attention in stage.named_attentions().items()
    }


def network_of(model: nn.Module, stage_name: str) -> str:
    """Name of the network that owns a stage, such as ``student.backbone``.

    Args:
        model (nn.Module): A model, not wrapped.
        stage_name (str): As of :func:`attention_stages`.

    Returns:
        str: Name of the nearest module around the stage that is more than a
        list of modules; empty for the model itself.
    """
    name = stage_name.rpartition('.')[0]
    while isinstance(
        model.get_submodule(name), (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    ):
        name = name.rpartition('.')[0]
    return name


def trained_stages(
    model: nn.Module, parameters: Iterable[nn.Parameter]
) -> Dict[str, AttentionStage]:
    """Stages of the networks in a model that are being trained.

    A network, such as a backbone, is judged as a whole: a frozen stage of one
    that is trained counts, a frozen teacher does not.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.
        parameters (Iterable[nn.Parameter]): What the optimizer updates, where
            it has a gradient.

    Returns:
        dict[str, AttentionStage]: By name, as of :func:`attention_stages`.
    """
    if is_model_wrapper(model):
        model = model.module
    updated = {id(param) for param in parameters if param.requires_grad}
    return {
        name: stage
        for name, stage in attention_stages(model).items()
        if any(
            id(param) in updated
            for param in model.get_submodule(network_of(model, name)).parameters()
        )
    }


def prune(model: nn.Module, names: Sequence[str], keep_value: bool = False) -> None:
    """Prune layer attentions of a model. What is gone stays gone.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.
        names (Sequence[str]): Names as of :func:`layer_attentions`.
        keep_value (bool): Let later attentions still see the key and value.
            What no later attention of the stage would see goes all the same:
            its parameters would get no gradient, which distributed training
            waits for. Defaults to False.

    Raises:
        KeyError: If there is no layer attention of a name.
    """
    attentions = layer_attentions(model)
    state = AttentionState.VALUE_ONLY if keep_value else AttentionState.PRUNED
    for name in names:
        attention = attentions[name]
        attention.attention_state = max(attention.attention_state, state)
    for stage in attention_stages(model).values():
        for attention in reversed(stage.attentions):
            if attention.active:
                break
            attention.attention_state = AttentionState.PRUNED
