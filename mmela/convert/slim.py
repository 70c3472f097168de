import copy
from typing import Any, Dict, List, Tuple, Union

from mmengine.config import Config, ConfigDict
from torch import Tensor, nn

from ..attach import AttachedStages
from ..hooks import LayerAttentionPruningHook
from ..layers import AttentionState
from ..structure import layer_attentions

AttentionBlocks = Dict[str, List[List[Union[int, str]]]]


def slim_state_dict(model: nn.Module) -> Tuple[Dict[str, Tensor], AttentionBlocks]:
    """State dict of a network without its pruned attentions.

    An attention that keeps its value for later ones stays.

    Args:
        model (nn.Module): A network with layer attentions.

    Returns:
        tuple[dict[str, Tensor], dict[str, list[list[int | str]]]]: The state
        dict without the keys of pruned attentions, and the blocks that still
        have an attention: for each backbone, by its name in the network such
        as ``backbone``, a list of block indices per stage. Or of names, of a
        backbone that :func:`mmela.attach_layer_attention` gave attentions.

    Raises:
        ValueError: If there is no layer attention in the network.
    """
    attentions = layer_attentions(model)
    if not attentions:
        raise ValueError('the network has no layer attention')
    pruned = tuple(
        f'{name}.'
        for name, attention in attentions.items()
        if attention.attention_state == AttentionState.PRUNED
    )
    state_dict = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(pruned)
    }
    blocks: AttentionBlocks = {}
    for name, module in model.named_modules():
        if hasattr(module, 'remaining_attention_blocks'):
            blocks[name] = module.remaining_attention_blocks()
        elif isinstance(module, AttachedStages):
            # Those of a class of mmela are named by it already
            blocks.setdefault(name.rpartition('.')[0], module.remaining_blocks())
    return state_dict, blocks


def slim_config(cfg: Config, blocks: AttentionBlocks) -> Config:
    """Config that builds a network without its pruned attentions.

    The pruning hook is left out, as its work is done.

    Args:
        cfg (Config): Config of the network.
        blocks (dict[str, list[list[int | str]]]): What :func:`slim_state_dict`
            returns.

    Returns:
        Config: A changed copy.

    Raises:
        ValueError: If the config has no backbone where the network has one.
    """
    cfg = copy.deepcopy(cfg)
    for name, stages in blocks.items():
        node = cfg.model
        for part in name.split('.'):
            node = node.get(part) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or 'type' not in node:
            raise ValueError(
                f'the network has a backbone {name}, but its config has none there'
            )
        attached = any(isinstance(block, str) for stage in stages for block in stage)
        node['blocks' if attached else 'attention_blocks'] = stages
    cfg['custom_hooks'] = [
        hook for hook in cfg.get('custom_hooks') or [] if not _is_pruning_hook(hook)
    ]
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if _is_pruning_hook(hook):
            cfg['default_hooks'][name] = None
    return cfg


def _is_pruning_hook(hook: Any) -> bool:
    """Whether this is the config of a pruning hook, by name or by class."""
    kind = hook.get('type') if isinstance(hook, dict) else None
    if isinstance(kind, type):
        return issubclass(kind, LayerAttentionPruningHook)
    name = LayerAttentionPruningHook.__name__
    return isinstance(kind, str) and kind.split('.')[-1] == name
