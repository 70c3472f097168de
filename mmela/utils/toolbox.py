import pickle
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import List, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn


def find_tool(config: str, name: str) -> Path:
    """Find a tool of the toolbox that a config is written for.

    Args:
        config (str): Path of the config. Its ``default_scope`` names the
            toolbox: ``mmdet``, ``mmpretrain`` or ``mmseg``.
        name (str): File name of the tool, e.g. ``train.py``.

    Returns:
        Path: The tool in the toolbox's installation.

    Raises:
        FileNotFoundError: If there is no such config, or the toolbox ships no
            such tool.
        ValueError: If the config names no toolbox that is installed.
    """
    if not Path(config).is_file():
        raise FileNotFoundError(f'no config at {config}')
    scope = Config.fromfile(config).get('default_scope')
    spec = find_spec(scope) if scope else None
    if spec is None:
        raise ValueError(
            f'{config} has default_scope={scope!r}, which is no '
            'installed toolbox: mmdet, mmpretrain or mmseg'
        )
    tool = Path(spec.origin).parent / '.mim' / 'tools' / name
    if not tool.is_file():
        raise FileNotFoundError(f'{scope} has no {tool}; install it with pip or mim')
    return tool


def run_tool(
    name: str, argv: List[str], usage: str, files: Tuple[str, ...] = ()
) -> None:
    """Run a toolbox's tool in this process, for a config of that toolbox.

    Args:
        name (str): File name of the tool, e.g. ``train.py``.
        argv (list[str]): Its command-line arguments; the config comes first.
        usage (str): What to print where the config is missing.
        files (tuple[str]): What the arguments after the config are, each a
            file or an address. Defaults to none.

    Raises:
        SystemExit: With one clear line if the config, the tool or a file is
            missing.
    """
    if not argv or argv[0] in ('-h', '--help'):
        print(usage.strip())
        raise SystemExit(0 if argv else 2)
    try:
        tool = find_tool(argv[0], name)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f'error: {error}')
    for label, path in zip(files, argv[1:]):
        if path.startswith('-'):
            break
        if '://' not in path and not Path(path).is_file():
            raise SystemExit(f'error: no {label} at {path}')
    sys.argv = [str(tool), *argv]
    runpy.run_path(str(tool), run_name='__main__')


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


def one_line(error: Exception) -> str:
    """What an exception says, for the one line of a command-line tool."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return ' '.join(str(text).split())
