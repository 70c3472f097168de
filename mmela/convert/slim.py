import copy
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Tuple, Union

import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor, nn

from ..attach import input_channels
from ..command_line import one_line
from ..compat.loaders import write_safetensors
from ..files import replacing
from ..hooks import LayerAttentionPruningHook
from ..layers import AttentionState, LayerAttention
from ..layers.features import tensors
from ..structure import attention_stages, layer_attentions
from .networks import build_network, load_fitting, open_network

AttentionBlocks = Dict[str, List[List[str]]]
# Entries of a checkpoint's `meta` that still apply after the training
KEPT_META = ('dataset_meta', 'epoch', 'iter')


class SlimNetwork(NamedTuple):
    """A network without its pruned attentions.

    Attributes:
        cfg (Config): Its config.
        state_dict (dict[str, Tensor]): Its state dict.
        meta (dict): Information on its data set and training.
        blocks (dict[str, list[list[str]]]): Blocks of each backbone, as returned by
            :func:`slim_state_dict`.
        before (dict[str, Tensor]): The state dict before slimming.
        attentions (int): Number of attentions before slimming.
    """

    cfg: Config
    state_dict: Dict[str, Tensor]
    meta: dict
    blocks: AttentionBlocks
    before: Dict[str, Tensor]
    attentions: int

    def save(self, path: Union[str, Path], config: Union[str, Path]) -> None:
        """Write the checkpoint and the config.

        Args:
            path (str | Path): Checkpoint to write, in the format of safetensors if
                the name ends with ``.safetensors``.
            config (str | Path): Config to write; neither appears without the
                other.

        Raises:
            OSError: If one of them cannot be written.
        """
        for out in (path, config):
            Path(out).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as weights:
            if weights.suffix == '.safetensors':
                write_safetensors(weights, self.state_dict, self.meta)
            else:
                torch.save(dict(meta=self.meta, state_dict=self.state_dict), weights)
            with replacing(config) as text:
                self.cfg.dump(text)


def slim_network(
    config: Union[str, Path],
    checkpoint: Union[str, Path],
    *outs: Union[str, Path],
    size: int = 128,
) -> SlimNetwork:
    """Remove pruned attentions, and check that the outputs stay the same.

    Args:
        config (str | Path): Config of the pruned network.
        checkpoint (str | Path): Its checkpoint.
        *outs (str | Path): Files to be written, which must not exist yet.
        size (int): Height and width in pixels of the images for the check.
            Defaults to 128.

    Returns:
        SlimNetwork: The slim network.

    Raises:
        SystemExit: As in :func:`~mmela.convert.networks.open_network`.
        ValueError: If the network has no layer attention, the checkpoint does not
            fit, two of ``outs`` are the same file, or the outputs of the backbones
            differ.
    """
    if len({Path(out) for out in outs}) < len(outs):
        raise ValueError(
            f'{outs[0]} cannot be both checkpoint and config; give two names'
        )
    cfg, meta, state_dict = open_network(config, checkpoint, *outs)
    model = build_network(cfg.model, config).eval()
    attentions = layer_attentions(model)
    if not attentions:
        raise ValueError(f'{config} has no layer attention')
    load_fitting(model, state_dict, config, checkpoint)
    slim_state, blocks = slim_state_dict(model)
    slim_cfg = slim_config(cfg, blocks)
    slim = build_network(slim_cfg.model, f'the slim form of {config}').eval()
    load_fitting(slim, slim_state, f'the slim form of {config}', checkpoint)
    try:
        gap = _difference(model, slim, blocks, size)
    except Exception as error:  # a user's network may raise anything
        raise ValueError(
            f'the backbone of {config} does not run on images of {size} pixels: '
            f'{one_line(error)}'
        ) from error
    if gap != 0:
        raise ValueError(
            f'{checkpoint}: the outputs of the slim network differ by {gap} from the '
            'pruned one'
        )
    meta = {key: meta[key] for key in KEPT_META if key in meta}
    return SlimNetwork(slim_cfg, slim_state, meta, blocks, state_dict, len(attentions))


@torch.no_grad()
def _difference(
    one: nn.Module, other: nn.Module, names: Iterable[str], size: int
) -> float:
    """Largest absolute difference of the outputs of two networks' backbones."""
    gaps = [0.0]
    for name in names:
        networks = [model.get_submodule(name) for model in (one, other)]
        shape = (2, input_channels(networks[0]), size, size)
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        outputs = [[t for _, t in tensors(network(x))] for network in networks]
        gaps += [float((a - b).abs().max()) for a, b in zip(*outputs)]
    return max(gaps)


def slim_state_dict(model: nn.Module) -> Tuple[Dict[str, Tensor], AttentionBlocks]:
    """Remove pruned attentions from the state dict of a network.

    An attention that keeps its value for later ones stays.

    Args:
        model (nn.Module): A network with layer attentions.

    Returns:
        tuple[dict[str, Tensor], dict[str, list[list[str]]]]: The state dict without
        the keys of pruned attentions; and the argument ``blocks`` of
        :func:`mmela.attach_layer_attention` for each backbone, by its name in the
        network, such as ``backbone``. It lists the block names of each stage, with a
        leading ``'!'`` for those without an attention.

    Raises:
        ValueError: If the network has no layer attention.
    """
    stages = attention_stages(model)
    if not stages:
        raise ValueError('the network has no layer attention')
    state_dict = dict(model.state_dict())
    blocks: AttentionBlocks = {}
    for stage in stages.values():
        kept = set()
        for name, attention in stage.named.items():
            pruned = attention.attention_state == AttentionState.PRUNED
            if pruned and not _holds_shared(attention, stage.attentions):
                for key in [k for k in state_dict if k.startswith(f'{name}.')]:
                    del state_dict[key]
            else:
                kept.add(attention.place.block)
        names = [n if n in kept else f'!{n}' for n in stage.place.blocks]
        blocks.setdefault(stage.network, []).append(names)
    return state_dict, blocks


def _holds_shared(attention: LayerAttention, stage: List[LayerAttention]) -> bool:
    """Whether an attention holds shared submodules that unpruned ones still use."""
    return any(hasattr(attention, name) for name in attention.shared) and any(
        other.attention_state != AttentionState.PRUNED for other in stage
    )


def slim_config(cfg: Config, blocks: AttentionBlocks) -> Config:
    """Make a config that builds a network without its pruned attentions.

    It drops the pruning hook, whose work is done, the work directory, and the
    checkpoints that the training started from, which the slim checkpoint replaces.

    Args:
        cfg (Config): Config of the network.
        blocks (dict[str, list[list[str]]]): Blocks from :func:`slim_state_dict`.

    Returns:
        Config: A changed copy.

    Raises:
        ValueError: If the config has no entry for a backbone of the network.
    """
    cfg = copy.deepcopy(cfg)
    for name, stages in blocks.items():
        node = cfg.model
        for part in filter(None, name.split('.')):
            if isinstance(node, (list, tuple)) and part.isdigit():
                node = node[int(part)] if int(part) < len(node) else None
            else:
                node = node.get(part) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or 'type' not in node:
            raise ValueError(
                f'the network has a backbone at {name!r}, but its config has none there'
            )
        node.pop('attention_blocks', None)  # from versions before 0.2
        node['blocks'] = stages
    cfg['model'] = without_pretrained(cfg.to_dict()['model'])
    for key in ('load_from', 'resume', 'work_dir'):
        cfg.pop(key, None)
    cfg['custom_hooks'] = [
        hook for hook in cfg.get('custom_hooks') or [] if not _is_pruning_hook(hook)
    ]
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if _is_pruning_hook(hook):
            cfg['default_hooks'][name] = None
    return cfg


def without_pretrained(node: Any) -> Any:
    """Replace every ``init_cfg`` that names a checkpoint with None.

    Args:
        node (Any): The config of a model, or a part of it.

    Returns:
        Any: A copy.
    """
    if isinstance(node, dict):
        names = (
            isinstance(node.get('init_cfg'), dict) and 'checkpoint' in node['init_cfg']
        )
        node = dict(node, init_cfg=None) if names else node
        return {key: without_pretrained(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(map(without_pretrained, node))
    return node


def _is_pruning_hook(hook: Any) -> bool:
    """Whether this is the config of a pruning hook, by name or by class."""
    kind = hook.get('type') if isinstance(hook, dict) else None
    if isinstance(kind, type):
        return issubclass(kind, LayerAttentionPruningHook)
    name = LayerAttentionPruningHook.__name__
    return isinstance(kind, str) and kind.split('.')[-1] == name
