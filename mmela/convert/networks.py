from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from ..command_line import one_line, one_line_errors
from ..compat.checkpoints import load_checkpoint
from ..compat.loaders import is_on_hub
from ..layers import AttentionState
from ..layers.state import decode
from .published import strip_module

# What building a network of somebody's config, and loading it, may raise
NETWORK_ERRORS = (
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def open_network(
    config: Union[str, Path],
    checkpoint: Union[str, Path],
    *outs: Union[str, Path],
    cfg_options: Optional[dict] = None,
) -> Tuple[Config, dict, Dict[str, Tensor]]:
    """Read a network's config and checkpoint for a command-line tool.

    The default scope becomes that of the config. A pre-processing that stands
    beside the model, as in MMPretrain, becomes a part of it, as in a runner.

    Args:
        config (str | Path): Path of the config.
        checkpoint (str | Path): Path of the checkpoint or of a bare state
            dict, of torch or of safetensors; ``hf://...`` on the Hub.
        *outs (str | Path): Files that the tool will write.
        cfg_options (dict, optional): Changes of the config. Defaults to None.

    Returns:
        tuple[Config, dict, dict[str, Tensor]]: The config, what the checkpoint
        tells about its training (``meta``, maybe empty), and the state dict on
        the CPU.

    Raises:
        SystemExit: With one clear line if an input is missing or is not what
            it should be, or an output exists already.
    """
    for path in (config, checkpoint):
        if not is_on_hub(path) and not Path(path).is_file():
            raise SystemExit(f'error: no file {path}')
    for path in outs:
        if Path(path).exists():
            raise SystemExit(f'error: {path} exists already')
    try:
        cfg = Config.fromfile(config)
        has_model = isinstance(cfg.get('model'), dict)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
    except Exception as error:  # a config is code: it may raise anything
        line = f'error: {config} cannot be read: {one_line(error)}'
        raise SystemExit(line) from error
    if not has_model:
        raise SystemExit(f'error: {config} has no model')
    cfg.merge_from_dict(cfg_options or {})
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with one_line_errors(ImportError, OSError, ValueError):
        meta, state_dict = read_state_dict(checkpoint)
    return cfg, meta, state_dict


def build_network(model: dict, config: Union[str, Path]) -> nn.Module:
    """Build the network of a config for a command-line tool.

    Args:
        model (dict): The config of the network.
        config (str | Path): Where it is from, for the message.

    Returns:
        nn.Module: The network.

    Raises:
        ValueError: If it cannot be built; the message names the config.
    """
    try:
        return MODELS.build(model)
    except Exception as error:  # somebody else's code may raise anything
        raise ValueError(
            f'{config} has a model that cannot be built: {type(error).__name__}: '
            f'{one_line(error)}'
        ) from error


def read_state_dict(
    checkpoint: Union[str, Path], names: Sequence[str] = ('state_dict',)
) -> Tuple[dict, Dict[str, Tensor]]:
    """Read the state dict in a checkpoint.

    Args:
        checkpoint (str | Path): Path of the checkpoint or of a bare state
            dict, of torch or of safetensors.
        names (Sequence[str]): Names under which the checkpoint may hold it.
            Defaults to ``('state_dict', )``.

    Returns:
        tuple[dict, dict[str, Tensor]]: What the checkpoint tells about its
        training (``meta``, maybe empty), and the state dict on the CPU.

    Raises:
        ImportError: If safetensors is needed and not installed.
        OSError: If the file cannot be opened.
        ValueError: If it is no checkpoint, is damaged, holds what could run
            code, or holds no state dict.
    """
    content = load_checkpoint(checkpoint)
    meta, state_dict = {}, content
    if _is_dict(content):
        meta = content.get('meta')
        for name in names:
            if _is_dict(content.get(name)):
                state_dict = content[name]
                break
    if not _is_dict(state_dict) or not any(map(torch.is_tensor, state_dict.values())):
        raise ValueError(f'{checkpoint} holds no state dict')
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise ValueError(f'{checkpoint} is damaged: {key!r:.99} is no name')
        if torch.is_tensor(value) and not _is_plain(value):
            raise ValueError(f'{checkpoint}: {key} is no tensor of plain numbers')
    return meta if _is_dict(meta) else {}, state_dict


def _is_dict(value: Any) -> bool:
    """Whether this is a dict that no file has given other methods."""
    attributes = getattr(value, '__dict__', {})
    return isinstance(value, dict) and not set(attributes) - {'_metadata'}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is such as networks have: dense, real and here."""
    odd = tensor.is_quantized or tensor.is_complex() or tensor.is_nested
    if tensor.layout != torch.strided or tensor.device.type != 'cpu' or odd:
        return False
    # Of a few numbers in a file a stride of 0 would make a network of any size
    size = tensor.numel() * tensor.element_size()
    return size <= tensor.untyped_storage().nbytes()


def load_fitting(
    module: nn.Module,
    state_dict: Dict[str, Tensor],
    config: Union[str, Path],
    checkpoint: Union[str, Path],
) -> None:
    """Load a state dict that must fit key by key.

    Args:
        module (nn.Module): The network or a part of it.
        state_dict (dict[str, Tensor]): Its state dict.
        config (str | Path): Where the network is from, for the message.
        checkpoint (str | Path): Where the state dict is from.

    Raises:
        ValueError: If keys are missing or have no place, or shapes differ.
    """
    try:
        missing, unexpected = module.load_state_dict(state_dict, strict=False)
    except Exception as error:  # other shapes; a damaged file may raise anything
        reason = str(error).strip().split('\n')[-1].strip()
        raise ValueError(f'{checkpoint} does not fit {config}: {reason}') from error
    faults = [
        f'{len(keys)} {what} such as {keys[0]}'
        for keys, what in (
            (missing, 'keys are missing'),
            (unexpected, 'keys have no place'),
        )
        if keys
    ]
    if faults:
        raise ValueError(f'{checkpoint} does not fit {config}: {"; ".join(faults)}')


def load_mostly_fitting(
    model: nn.Module,
    state_dict: Dict[str, Tensor],
    config: Union[str, Path],
    checkpoint: Union[str, Path],
    force: bool = False,
) -> None:
    """Load a state dict as the toolboxes' tools do, unless it is of another network.

    Single keys may be missing, have another shape or no place; mmengine prints
    which.

    Args:
        model (nn.Module): The network.
        state_dict (dict[str, Tensor]): The state dict.
        config (str | Path): Where the network is from, for the message.
        checkpoint (str | Path): Where the state dict is from.
        force (bool): Load it in any case. Defaults to False.

    Raises:
        ValueError: If most keys of one of the network's parts, such as its head or
            a layer attention, are missing or have another shape, or the network has
            no place for layer attentions that are not pruned. The message has the
            counts.
    """
    state_dict = strip_module(state_dict)
    if not force:
        check_fit(model, state_dict, config, checkpoint)
    load_state_dict(model, state_dict)


def check_fit(
    model: nn.Module,
    state_dict: Dict[str, Tensor],
    config: Union[str, Path],
    checkpoint: Union[str, Path],
) -> None:
    """Refuse the state dict of another network, see :func:`load_mostly_fitting`.

    The network takes from it what fits.

    Args:
        model (nn.Module): The network.
        state_dict (dict[str, Tensor]): What is to be loaded into it.
        config (str | Path): Config of the network, for the message.
        checkpoint (str | Path): The checkpoint, for the message.

    Raises:
        ValueError: If most keys of a part of the network are missing or have
            another shape, or it has no place for layer attentions that are not
            pruned.
    """
    own = model.state_dict()
    try:  # Modules may rename keys of earlier versions
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
    except RuntimeError:
        missing = [
            key
            for key, value in own.items()
            if key not in state_dict or state_dict[key].shape != value.shape
        ]
        unexpected = [key for key in state_dict if key not in own]
    spare = _attentions_in(state_dict, unexpected)
    if spare:
        raise ValueError(
            f'{checkpoint} has {len(spare)} layer attentions that {config} has no '
            f'place for, such as {spare[0]}: without them it is another network. Give '
            'the config that it was trained with; --force takes it all the same'
        )
    parts: Dict[str, list] = {}
    for key in own:
        # A slim checkpoint lacks attentions that the whole network would run
        attention, found, _ = key.partition('.layer_attn.')
        part = f'{attention}.layer_attn' if found else key.partition('.')[0]
        parts.setdefault(part, []).append(key)
    lacking = set(missing)
    faults = [
        f'{len(lacking.intersection(keys))} of {len(keys)} of its {part}'
        for part, keys in parts.items()
        if 2 * len(lacking.intersection(keys)) > len(keys)
    ]
    if faults:
        spare = sum(key not in own for key in state_dict)
        slim = all('.layer_attn.' in key for key in missing) and any(
            '.layer_attn.' in key for key in state_dict
        )
        hint = 'a slim checkpoint goes with the config that slim.py wrote; '
        raise ValueError(
            f'{checkpoint} is of another network than {config}: {len(missing)} of the '
            f"network's {len(own)} keys are missing or have another shape, such as "
            f'{missing[0]} ({", ".join(faults[:3])}), and {spare} of the '
            f"checkpoint's {len(state_dict)} keys have no place; "
            f'{hint if slim else ""}--force takes it all the same'
        )


def _attentions_in(state_dict: Dict[str, Tensor], keys: Sequence[str]) -> List[str]:
    """Names of layer attentions that some keys are of, without those pruned whole."""
    names = [key.rpartition('.state')[0] for key in keys if key.endswith('.state')]
    found = []
    for name in names:
        if name.split('.')[-1] == 'layer_attn':
            try:
                state = decode(state_dict[f'{name}.state'])[0]
            except ValueError:
                state = AttentionState.ACTIVE
            if state != AttentionState.PRUNED:
                found.append(name)
    return found
