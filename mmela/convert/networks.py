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

# Exceptions that building a user's network and loading it may raise
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

    This sets the default scope to that of the config. A ``data_preprocessor`` beside
    the model, as in MMPretrain, becomes part of the model, as in a runner.

    Args:
        config (str | Path): Path of the config.
        checkpoint (str | Path): Path of a checkpoint or of a bare state dict, in the
            format of torch or safetensors; or ``hf://...`` on the Hub.
        *outs (str | Path): Files that the tool will write.
        cfg_options (dict, optional): Changes to the config. Defaults to None.

    Returns:
        tuple[Config, dict, dict[str, Tensor]]: The config, the ``meta`` of the
        checkpoint, which may be empty, and the state dict on the CPU.

    Raises:
        SystemExit: With a one-line error if an input is missing or invalid, or if an
            output already exists.
    """
    for path in (config, checkpoint):
        if not is_on_hub(path) and not Path(path).is_file():
            raise SystemExit(f'error: there is no file {path}')
    for path in outs:
        if Path(path).exists():
            raise SystemExit(f'error: {path} already exists')
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
        model (dict): Config of the network.
        config (str | Path): Source of the config, for the message.

    Returns:
        nn.Module: The network.

    Raises:
        ValueError: If building fails; the message names the config.
    """
    try:
        return MODELS.build(model)
    except Exception as error:  # a user's network may raise anything
        raise ValueError(
            f'the model of {config} cannot be built: {type(error).__name__}: '
            f'{one_line(error)}'
        ) from error


def read_state_dict(
    checkpoint: Union[str, Path], names: Sequence[str] = ('state_dict',)
) -> Tuple[dict, Dict[str, Tensor]]:
    """Read the state dict of a checkpoint.

    Args:
        checkpoint (str | Path): Path of a checkpoint or of a bare state dict, in the
            format of torch or safetensors.
        names (Sequence[str]): Keys under which the checkpoint may hold the state
            dict. Defaults to ``('state_dict', )``.

    Returns:
        tuple[dict, dict[str, Tensor]]: The ``meta`` of the checkpoint, which may be
        empty, and the state dict on the CPU.

    Raises:
        ImportError: If safetensors is needed and not installed.
        OSError: If the file cannot be opened.
        ValueError: If the file is not a checkpoint, is damaged, could run code, or
            has no state dict.
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
        raise ValueError(f'{checkpoint} has no state dict')
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise ValueError(
                f'{checkpoint} is damaged: key {key!r:.99} is not a string'
            )
        if torch.is_tensor(value) and not _is_plain(value):
            raise ValueError(
                f'{checkpoint}: {key} is not a dense tensor of real numbers on the CPU'
            )
    return meta if _is_dict(meta) else {}, state_dict


def _is_dict(value: Any) -> bool:
    """Whether this is a dict whose methods the file has not overridden."""
    attributes = getattr(value, '__dict__', {})
    return isinstance(value, dict) and not set(attributes) - {'_metadata'}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, real and on the CPU, as in a network."""
    odd = tensor.is_quantized or tensor.is_complex() or tensor.is_nested
    if tensor.layout != torch.strided or tensor.device.type != 'cpu' or odd:
        return False
    # With a stride of 0, a tiny file could describe a tensor of any size
    size = tensor.numel() * tensor.element_size()
    return size <= tensor.untyped_storage().nbytes()


def load_fitting(
    module: nn.Module,
    state_dict: Dict[str, Tensor],
    config: Union[str, Path],
    checkpoint: Union[str, Path],
) -> None:
    """Load a state dict that must match key by key.

    Args:
        module (nn.Module): The network or a part of it.
        state_dict (dict[str, Tensor]): Its state dict.
        config (str | Path): Source of the network, for the message.
        checkpoint (str | Path): Source of the state dict, for the message.

    Raises:
        ValueError: If keys are missing or unexpected, or if shapes differ.
    """
    try:
        missing, unexpected = module.load_state_dict(state_dict, strict=False)
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).strip().split('\n')[-1].strip()
        raise ValueError(f'{checkpoint} does not fit {config}: {reason}') from error
    faults = [
        f'{len(keys)} {what}, such as {keys[0]}'
        for keys, what in (
            (missing, 'keys are missing'),
            (unexpected, 'keys are not in the network'),
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
    """Load a state dict like the toolboxes' tools, but reject a different network.

    Single keys may be missing, unexpected or of another shape; mmengine prints them.

    Args:
        model (nn.Module): The network.
        state_dict (dict[str, Tensor]): The state dict.
        config (str | Path): Source of the network, for the message.
        checkpoint (str | Path): Source of the state dict, for the message.
        force (bool): Skip the check. Defaults to False.

    Raises:
        ValueError: If most keys of a part of the network, such as its head or a
            layer attention, are missing or have another shape, or if the network
            lacks layer attentions that are not pruned. The message gives the
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
    """Reject the state dict of a different network, see :func:`load_mostly_fitting`.

    This loads the matching keys into the network.

    Args:
        model (nn.Module): The network.
        state_dict (dict[str, Tensor]): The state dict to check.
        config (str | Path): Source of the network, for the message.
        checkpoint (str | Path): Source of the state dict, for the message.

    Raises:
        ValueError: If most keys of a part of the network are missing or have
            another shape, or if the network lacks layer attentions of the state dict
            that are not pruned.
    """
    expected = model.state_dict()
    try:  # Modules may rename keys of earlier versions
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
    except RuntimeError:
        missing = [
            key
            for key, value in expected.items()
            if key not in state_dict or state_dict[key].shape != value.shape
        ]
        unexpected = [key for key in state_dict if key not in expected]
    spare = _attentions_in(state_dict, unexpected)
    if spare:
        raise ValueError(
            f'{checkpoint} has {len(spare)} layer attentions that are not in {config}, '
            f'such as {spare[0]}; without them the network computes something else. '
            'Use the config it was trained with, or pass --force to load it anyway'
        )
    parts: Dict[str, list] = {}
    for key in expected:
        # Each attention counts as a part, because a slim checkpoint lacks some
        block, separator, _ = key.partition('.layer_attn.')
        part = f'{block}.layer_attn' if separator else key.partition('.')[0]
        parts.setdefault(part, []).append(key)
    lacking = set(missing)
    faults = [
        f'{len(lacking.intersection(keys))} of {len(keys)} in {part}'
        for part, keys in parts.items()
        if 2 * len(lacking.intersection(keys)) > len(keys)
    ]
    if faults:
        unexpected = sum(key not in expected for key in state_dict)
        slim = all('.layer_attn.' in key for key in missing) and any(
            '.layer_attn.' in key for key in state_dict
        )
        hint = 'use a slim checkpoint with the config that mmela slim wrote, or '
        raise ValueError(
            f'{checkpoint} comes from a different network than {config}: '
            f"{len(missing)} of the network's {len(expected)} keys are missing or have "
            f'another shape, such as {missing[0]} ({", ".join(faults[:3])}), and '
            f"{unexpected} of the checkpoint's {len(state_dict)} keys are not in the "
            f'network; {hint if slim else ""}pass --force to load it anyway'
        )


def _attentions_in(state_dict: Dict[str, Tensor], keys: Sequence[str]) -> List[str]:
    """Find the layer attentions that keys belong to, except fully pruned ones."""
    names = [key.rpartition('.state')[0] for key in keys if key.endswith('.state')]
    attentions = []
    for name in names:
        if name.split('.')[-1] == 'layer_attn':
            try:
                state = decode(state_dict[f'{name}.state'])[0]
            except ValueError:
                state = AttentionState.ACTIVE
            if state != AttentionState.PRUNED:
                attentions.append(name)
    return attentions
