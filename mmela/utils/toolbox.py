import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import List, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope


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
        raise ValueError(f'{config} has default_scope={scope!r}, which is no '
                         'installed toolbox such as mmdet, mmpretrain or mmseg')
    tool = Path(spec.origin).parent / '.mim' / 'tools' / name
    if not tool.is_file():
        raise FileNotFoundError(
            f'{scope} has no {tool}; install it with pip or mim')
    return tool


def run_tool(name: str, argv: List[str], usage: str) -> None:
    """Run a toolbox's tool in this process, for a config of that toolbox.

    Args:
        name (str): File name of the tool, e.g. ``train.py``.
        argv (list[str]): Its command-line arguments; the config comes first.
        usage (str): What to print where the config is missing.

    Raises:
        SystemExit: With one clear line if the config or the tool is missing.
    """
    if not argv or argv[0] in ('-h', '--help'):
        print(usage.strip())
        raise SystemExit(0 if argv else 2)
    try:
        tool = find_tool(argv[0], name)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f'error: {error}')
    sys.argv = [str(tool), *argv]
    runpy.run_path(str(tool), run_name='__main__')


def open_network(config: str, checkpoint: str,
                 *outs: Path) -> Tuple[Config, dict, dict]:
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
        SystemExit: With one clear line if an input is missing or an output
            exists already.
    """
    for path in (config, checkpoint):
        if not Path(path).is_file():
            raise SystemExit(f'error: no file {path}')
    for path in outs:
        if Path(path).exists():
            raise SystemExit(f'error: {path} exists already')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    content = torch.load(checkpoint, map_location='cpu', weights_only=True)
    return cfg, content, content.get('state_dict', content)
