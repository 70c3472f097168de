import copy
import re
from typing import Dict, List, Tuple

from mmengine.config import Config, ConfigDict
from torch import Tensor

from ..layers import AttentionState

# Stages of a ResNet are named from 1, hooked stages numbered from 0.
_STATE_KEY = re.compile(
    r'(?P<prefix>.*?)(?:layer(?P<named>\d+)|layer_attn_stages\.(?P<stage>\d+))'
    r'\.(?P<block>\d+)\.layer_attn\.state'
)


def slim_state_dict(
    state_dict: Dict[str, Tensor],
) -> Tuple[Dict[str, Tensor], Dict[str, List[List[int]]]]:
    """Leave pruned attentions out of a state dict.

    An attention that keeps its value for later ones stays.

    Args:
        state_dict (dict[str, Tensor]): State dict of a network with layer
            attentions.

    Returns:
        tuple: The state dict without the keys of pruned attentions, and the
        blocks that still have an attention: for each backbone, by the prefix
        of its keys such as ``backbone.``, a list of block indices per stage.

    Raises:
        ValueError: If there is no layer attention in the state dict.
    """
    blocks: Dict[str, Dict[int, List[int]]] = {}
    pruned = []
    for key, value in state_dict.items():
        match = _STATE_KEY.fullmatch(key)
        if match is None:
            continue
        stages = blocks.setdefault(match['prefix'], {})
        stage = int(match['stage'] or int(match['named']) - 1)
        active = stages.setdefault(stage, [])
        if AttentionState(int(value)) == AttentionState.PRUNED:
            pruned.append(key[: -len('state')])
        else:
            active.append(int(match['block']))
    if not blocks:
        raise ValueError(
            'the state dict has no layer attention: no key ends with .layer_attn.state'
        )
    slim = {
        key: value
        for key, value in state_dict.items()
        if not key.startswith(tuple(pruned))
    }
    return slim, {
        prefix: [sorted(stages.get(i, [])) for i in range(max(stages) + 1)]
        for prefix, stages in blocks.items()
    }


def slim_config(cfg: Config, blocks: Dict[str, List[List[int]]]) -> Config:
    """Config that builds a network without its pruned attentions.

    The pruning hook is left out, as its work is done.

    Args:
        cfg (Config): Config of the network.
        blocks (dict[str, list[list[int]]]): What :func:`slim_state_dict`
            returns.

    Returns:
        Config: A changed copy.

    Raises:
        ValueError: If the config has no backbone where the keys say.
    """
    cfg = copy.deepcopy(cfg)
    for prefix, stages in blocks.items():
        node = cfg.model
        for name in prefix.split('.')[:-1]:
            node = node.get(name) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or 'type' not in node:
            raise ValueError(
                f'the checkpoint has layer attentions under {prefix!r}, but '
                'the config has no backbone there'
            )
        if 'depth' in node:
            # Trailing stages may have no attention, and so no key.
            depth = node.get('num_stages', 4)
            stages = (stages + [[]] * depth)[:depth]
        node['attention_blocks'] = stages
    cfg['custom_hooks'] = [
        hook
        for hook in cfg.get('custom_hooks', [])
        if hook['type'] != 'LayerAttentionPruningHook'
    ]
    return cfg
