"""The layer attentions of a model: where they are, and pruning them."""

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
    """The layer attentions of a stage, as they are in a model.

    Attributes:
        name (str): Name of the stage in the model, such as ``backbone.layer1``.
        network (str): Name of the network in the model that was given its
            attentions, such as ``backbone``; empty for the model itself.
        place (Stage): What its attentions have in common.
        named (dict[str, LayerAttention]): Its attentions by their names in the
            model, in the order of the forward pass, pruned ones too.
        blocks (dict[str, nn.Module]): All blocks of the stage by their names in
            the model, those without an attention too.
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
    """Stages of a model that have layer attentions.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        dict[str, AttentionStage]: By name, in the order of the forward pass,
        e.g. ``backbone.layer1``.
    """
    if is_model_wrapper(model):
        model = model.module
    found: Dict[int, AttentionStage] = {}
    modules = dict(model.named_modules())
    for block_name, block in modules.items():
        attention = getattr(block, 'layer_attn', None)
        if not isinstance(attention, LayerAttention) or attention.place is None:
            continue
        place = attention.place
        name = f'{block_name}.layer_attn' if block_name else 'layer_attn'
        network = block_name[: -len(place.block)].rstrip('.')
        if not block_name.endswith(place.block):
            network = ''  # a part of the network, in another
        stage = found.setdefault(
            id(place.stage), AttentionStage('', network, place.stage)
        )
        stage.named[name] = attention
    networks = list(dict.fromkeys(stage.network for stage in found.values()))
    stages = sorted(
        found.values(), key=lambda s: (networks.index(s.network), s.place.number)
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
    """Stages by the names that their blocks have in common, such as ``layer1``.

    Where several have the same, the numbers of their blocks tell them apart:
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
    """Layer attentions of a model, pruned ones too.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        dict[str, LayerAttention]: By name, in the order of the forward pass,
        e.g. ``backbone.layer1.0.layer_attn``.
    """
    return {
        name: attention
        for stage in attention_stages(model).values()
        for name, attention in stage.named.items()
    }


def unreached(model: nn.Module) -> List[str]:
    """Active layer attentions that no forward pass has come to.

    After the first training pass there should be none: an attention may be in a
    part of the network that does not run, or its block may be called by another
    method than its forward.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.

    Returns:
        list[str]: Their names.
    """
    return [
        name
        for name, attention in layer_attentions(model).items()
        if attention.active and not attention.reached
    ]


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
            for param in model.get_submodule(stage.network).parameters()
        )
    }


def prune(model: nn.Module, names: Sequence[str], keep_value: bool = False) -> None:
    """Prune layer attentions of a model. What is gone stays gone.

    Args:
        model (nn.Module): A model, wrapped for distributed training or not.
        names (Sequence[str]): Names as of :func:`layer_attentions`, or of the
            blocks, as in the table that attaching them prints, see
            :func:`find_attention`.
        keep_value (bool): Let later attentions still see the key and value.
            What no later attention of the stage would see goes all the same:
            its parameters would get no gradient, which distributed training
            waits for. Defaults to False.

    Raises:
        KeyError: If there is no layer attention of a name; nothing is pruned then.
        TypeError: If ``names`` is one string.
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
    """A layer attention by its name or by that of its block.

    Args:
        attentions (dict[str, LayerAttention]): Of :func:`layer_attentions`.
        name (str): The name, with or without ``.layer_attn``, in the model or, as in
            the table that attaching prints, in the network that was given attentions.

    Returns:
        LayerAttention: The attention.

    Raises:
        KeyError: If there is none, or several networks have one; the message lists
            those that there are, the most alike first.
    """
    if name in attentions:
        return attentions[name]
    block = re.sub(r'\.layer_attn$', '', str(name))
    if f'{block}.layer_attn' in attentions:
        return attentions[f'{block}.layer_attn']
    found = [n for n, a in attentions.items() if a.place and a.place.block == block]
    if len(found) == 1:
        return attentions[found[0]]
    if found:
        raise KeyError(
            f'layer attention {name!r} is one of {", ".join(found)}: say which'
        )
    known = [re.sub(r'\.layer_attn$', '', other) for other in attentions]
    raise KeyError(
        f'there is no layer attention {name!r}{did_you_mean(block, known)}; there are '
        f'those of {", ".join(nearest_first(block, known)) or "no block"}'
    )
