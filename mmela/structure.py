"""Find, name and prune the layer attentions of a model."""

import re
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, List, Optional, Sequence

from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from .arguments import did_you_mean, nearest_first
from .layers import AttentionState, LayerAttention
from .layers.stage import Stage


@dataclass
class AttentionStage:
    """The layer attentions of one stage of a model.

    Attributes:
        name (str): Name of the stage in the model, such as ``backbone.layer1``.
        network (str): Name, in the model, of the network that the attentions were
            attached to, such as ``backbone``; empty for the model itself.
        place (Stage): The state that its attentions share.
        named (dict[str, LayerAttention]): Its attentions by their names in the
            model, in the order of the forward pass, including pruned ones.
        blocks (dict[str, nn.Module]): All blocks of the stage by their names in
            the model, including those without an attention.
    """

    name: str
    network: str
    place: Stage
    named: Dict[str, LayerAttention] = field(default_factory=dict)
    blocks: Dict[str, nn.Module] = field(default_factory=dict)

    @property
    def attentions(self) -> List[LayerAttention]:
        """list[LayerAttention]: The attentions, in order."""
        return list(self.named.values())

    @property
    def observer(self) -> Optional[Callable[[List[Tensor]], None]]:
        """callable | None: Called after each forward pass with the scores of the
        active attentions, those of :class:`mmela.layers.StageMemory`, without
        gradient."""
        return self.place.observer

    @observer.setter
    def observer(self, observer: Optional[Callable[[List[Tensor]], None]]) -> None:
        self.place.observer = observer


def attention_stages(model: nn.Module) -> Dict[str, AttentionStage]:
    """Find the stages of a model that have layer attentions.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        dict[str, AttentionStage]: The stages by name, such as ``backbone.layer1``,
        in the order of the forward pass.
    """
    if is_model_wrapper(model):
        model = model.module
    by_stage: Dict[int, AttentionStage] = {}
    modules = dict(model.named_modules())
    for block_name, block in modules.items():
        attention = getattr(block, 'layer_attn', None)
        if not isinstance(attention, LayerAttention) or attention.place is None:
            continue
        place = attention.place
        name = f'{block_name}.layer_attn' if block_name else 'layer_attn'
        network = block_name[: -len(place.block)].rstrip('.')
        if not block_name.endswith(place.block):
            network = ''  # a part of the network was moved into this model
        stage = by_stage.setdefault(
            id(place.stage), AttentionStage('', network, place.stage)
        )
        stage.named[name] = attention
    networks = list(dict.fromkeys(stage.network for stage in by_stage.values()))
    stages = sorted(
        by_stage.values(), key=lambda s: (networks.index(s.network), s.place.number)
    )
    for stage in stages:
        order = sorted(stage.named, key=lambda name: stage.named[name].place.index)
        stage.named = {name: stage.named[name] for name in order}
        prefix = f'{stage.network}.' if stage.network else ''
        names = [prefix + name for name in stage.place.blocks]
        if not all(name in modules for name in names):
            names = [name.rpartition('.')[0] for name in order]
        stage.blocks = {name: modules[name] for name in names}
    return _named(stages)


def _named(stages: Sequence[AttentionStage]) -> Dict[str, AttentionStage]:
    """Name each stage by the common part of its block names, such as ``layer1``.

    Stages with the same common part get the range of their blocks:
    ``layers.0-3``.
    """
    parts = [[name.split('.')[:-1] for name in stage.named] for stage in stages]
    common = []
    for names in parts:
        shared = 0
        for values in zip(*(name[:-1] for name in names)):
            if len(set(values)) > 1:
                break
            shared += 1
        common.append('.'.join(names[0][:shared]))
    result = {}
    for stage, names, name in zip(stages, parts, common):
        if common.count(name) > 1 or not name:
            depth = len(name.split('.')) if name else 0
            first, last = ('.'.join(part[depth:]) for part in (names[0], names[-1]))
            span = first if first == last else f'{first}-{last}'
            name = f'{name}.{span}' if name else span
        stage.name = name
        result[name] = stage
    return result


def layer_attentions(model: nn.Module) -> Dict[str, LayerAttention]:
    """Find the layer attentions of a model, including pruned ones.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        dict[str, LayerAttention]: The attentions by name, such as
        ``backbone.layer1.0.layer_attn``, in the order of the forward pass.
    """
    return {
        name: attention
        for stage in attention_stages(model).values()
        for name, attention in stage.named.items()
    }


def unreached(model: nn.Module) -> List[str]:
    """List active layer attentions that have not run yet.

    After the first training pass the list should be empty. Otherwise the block does
    not run, or the network does not call its ``forward``.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        list[str]: The names of the attentions.
    """
    return [
        name
        for name, attention in layer_attentions(model).items()
        if attention.active and not attention.reached
    ]


def trained_stages(
    model: nn.Module, parameters: Iterable[nn.Parameter]
) -> Dict[str, AttentionStage]:
    """Find the stages of the networks in a model that are being trained.

    A network, such as a backbone, counts as a whole: a frozen stage of a trained
    network is included, a frozen teacher is not.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.
        parameters (Iterable[nn.Parameter]): Parameters of the optimizer; those
            without ``requires_grad`` are ignored.

    Returns:
        dict[str, AttentionStage]: The stages by name, as in
        :func:`attention_stages`.
    """
    if is_model_wrapper(model):
        model = model.module
    updated = {id(param) for param in parameters if param.requires_grad}
    return {
        name: stage
        for name, stage in attention_stages(model).items()
        if any(
            id(param) in updated
            for param in model.get_submodule(stage.network).parameters()
        )
    }


def prune(model: nn.Module, names: Sequence[str], keep_value: bool = False) -> None:
    """Prune layer attentions of a model. An attention is never restored.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.
        names (Sequence[str]): Names from :func:`layer_attentions`, or names of the
            blocks from the table that attaching logs, see :func:`find_attention`.
        keep_value (bool): Let later attentions still see the key and value. If no
            later attention of the stage is active, key and value are pruned too:
            their parameters would get no gradient, which distributed training waits
            for. Defaults to False.

    Raises:
        KeyError: If a name matches no layer attention; nothing is pruned then.
        TypeError: If ``names`` is a string.
    """
    if isinstance(names, str):
        raise TypeError(f'names={names!r} is a string; give a list: [{names!r}]')
    attentions = layer_attentions(model)
    state = AttentionState.VALUE_ONLY if keep_value else AttentionState.PRUNED
    for attention in [find_attention(attentions, name) for name in names]:
        attention.attention_state = max(attention.attention_state, state)
    for stage in attention_stages(model).values():
        for attention in reversed(stage.attentions):
            if attention.active:
                break
            attention.attention_state = AttentionState.PRUNED


def find_attention(attentions: Dict[str, LayerAttention], name: str) -> LayerAttention:
    """Look up a layer attention by its name or the name of its block.

    Args:
        attentions (dict[str, LayerAttention]): Result of :func:`layer_attentions`.
        name (str): Name in the model, with or without ``.layer_attn``, or name of the
            block in the network that layer attention was attached to, as in the table
            that attaching logs.

    Returns:
        LayerAttention: The attention.

    Raises:
        KeyError: If the name is unknown or belongs to several networks. The message
            lists the known names, the most similar first.
    """
    if name in attentions:
        return attentions[name]
    block = re.sub(r'\.layer_attn$', '', str(name))
    if f'{block}.layer_attn' in attentions:
        return attentions[f'{block}.layer_attn']
    matches = [n for n, a in attentions.items() if a.place and a.place.block == block]
    if len(matches) == 1:
        return attentions[matches[0]]
    if matches:
        raise KeyError(
            f'{name!r} may be any of {", ".join(matches)}; use one of these names'
        )
    known = [re.sub(r'\.layer_attn$', '', other) for other in attentions]
    raise KeyError(
        f'there is no layer attention {name!r}{did_you_mean(block, known)}; blocks '
        f'with one: {", ".join(nearest_first(block, known)) or "none"}'
    )
