import pickle
from pathlib import Path
from typing import Tuple, Union

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from ..command_line import one_line


def open_network(
    config: str, checkpoint: str, *outs: Path
) -> Tuple[Config, dict, dict]:
    """Read a network's config and checkpoint for a command-line tool.

    The default scope becomes that of the config.

    Args:
        config (str): Path of the config.
        checkpoint (str): Path of the checkpoint, or of a bare state dict.
        *outs (Path): Files that the tool will write.

    Returns:
        tuple[Config, dict, dict]: The config, the checkpoint on the CPU, and
        the state dict in it.

    Raises:
        SystemExit: With one clear line if an input is missing or is not what
            it should be, or an output exists already.
    """
    for path in (config, checkpoint):
        if not Path(path).is_file():
            raise SystemExit(f'error: no file {path}')
    for path in outs:
        if Path(path).exists():
            raise SystemExit(f'error: {path} exists already')
    try:
        cfg = Config.fromfile(config)
    except Exception as error:  # a config is code: it may raise anything
        raise SystemExit(f'error: {config} cannot be read: {one_line(error)}')
    if not isinstance(cfg.get('model'), dict):
        raise SystemExit(f'error: {config} has no model')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    try:
        content = torch.load(checkpoint, map_location='cpu', weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
    ):
        raise SystemExit(
            f'error: {checkpoint} is no checkpoint, is damaged, '
            'or holds objects that may run code'
        )
    state_dict = (
        content.get('state_dict', content) if isinstance(content, dict) else None
    )
    if not isinstance(state_dict, dict) or not any(
        torch.is_tensor(value) for value in state_dict.values()
    ):
        raise SystemExit(f'error: {checkpoint} holds no state dict')
    return cfg, content, state_dict


def load_fitting(
    module: nn.Module,
    state_dict: dict,
    config: Union[str, Path],
    checkpoint: Union[str, Path],
) -> None:
    """Load a state dict that must fit key by key.

    Args:
        module (nn.Module): The network or a part of it.
        state_dict (dict): Its state dict.
        config (str | Path): Where the network is from, for the message.
        checkpoint (str | Path): Where the state dict is from.

    Raises:
        ValueError: If keys are missing or have no place, or shapes differ.
    """
    try:
        missing, unexpected = module.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:  # other shapes
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
