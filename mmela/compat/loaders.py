"""Load checkpoints from safetensors files and from the Hugging Face Hub.

``load_from``, ``init_cfg``, test tools and inferencers of the toolboxes all use
mmengine's ``CheckpointLoader``, which chooses a loader by the form of the path. The
loaders here are registered there and need no other change.
"""

import json
import re
from pathlib import Path
from typing import Any, Dict, Union

import torch
from mmengine.fileio import get_local_path
from mmengine.runner import CheckpointLoader
from torch import Tensor

# File in a repository on the Hub, written by `mmela push`
HUB_CHECKPOINT = 'model.safetensors'
_HUB_PATH = re.compile(r'hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?')
# Key of a checkpoint's `meta` in a safetensors file
_META = 'mmela.meta'


def is_on_hub(path: Union[str, Path]) -> bool:
    """Whether a path starts with ``hf://``, which names a repository on the Hub."""
    return str(path).startswith('hf://')


def local_checkpoint(path: Union[str, Path]) -> Path:
    """Locate a checkpoint; download it from the Hub unless it is in the cache.

    Args:
        path (str | Path): A file, or ``hf://USER/REPO[@REVISION][/FILE]``, where
            ``FILE`` defaults to ``model.safetensors``.

    Returns:
        Path: The file, or its copy in the Hub's cache.

    Raises:
        ImportError: If huggingface_hub is needed and not installed.
        OSError: If the Hub cannot be reached or does not have the file.
        ValueError: If the path starts with ``hf://`` but has another form.
    """
    if not is_on_hub(path):
        return Path(path)
    match = _HUB_PATH.fullmatch(str(path))
    if match is None:
        raise ValueError(
            f'{path} does not have the form hf://USER/REPO[@REVISION][/FILE]'
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ImportError(
            f'{path} needs huggingface_hub: pip install huggingface_hub'
        ) from error
    repo, revision, name = match.groups()
    try:
        file = hf_hub_download(repo, name or HUB_CHECKPOINT, revision=revision)
    except (HfHubHTTPError, OSError) as error:
        raise OSError(f'{path} cannot be downloaded: {error}') from error
    return Path(file)


def read_safetensors(path: Union[str, Path], device: Any = 'cpu') -> Dict[str, dict]:
    """Read a safetensors file as a checkpoint.

    Args:
        path (str | Path): The file.
        device (str | torch.device): Device of the tensors. Defaults to 'cpu'.

    Returns:
        dict[str, dict]: ``state_dict``, and ``meta``, which is empty unless mmela
        wrote the file.

    Raises:
        ImportError: If safetensors is not installed.
        OSError: If the file cannot be opened.
        ValueError: If the file is damaged.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f'{path} needs safetensors: pip install safetensors'
        ) from error
    with open(path, 'rb'):
        pass  # any error after this is due to the content
    try:
        with safe_open(str(path), framework='pt', device=str(device)) as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = json.loads((file.metadata() or {}).get(_META, '{}'))
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f'{path} is not a checkpoint or is damaged') from error
    if not isinstance(meta, dict):
        raise ValueError(f'{path} is damaged: {_META} is not a JSON object')
    return dict(meta=meta, state_dict=state_dict)


def write_safetensors(
    path: Union[str, Path], state_dict: Dict[str, Tensor], meta: dict
) -> None:
    """Write a checkpoint as a safetensors file.

    Args:
        path (str | Path): The file.
        state_dict (dict[str, Tensor]): The state dict.
        meta (dict): Information on the training, such as class names: numbers,
            strings and containers of them.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If the state dict holds anything other than tensors.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            f'{path} needs safetensors: pip install safetensors'
        ) from error
    for key, value in state_dict.items():
        if not torch.is_tensor(value):
            raise ValueError(
                f'{key} is a {type(value).__name__}; safetensors can only hold tensors'
            )
    # Copies, because safetensors rejects tensors that share memory
    tensors = {k: v.contiguous().clone() for k, v in state_dict.items()}
    text = json.dumps(meta, default=lambda value: value.tolist())
    save_file(tensors, str(path), metadata={'format': 'pt', _META: text})


def load_from_safetensors(filename: str, map_location: Any = None) -> dict:
    """Load a safetensors file for mmengine.

    Args:
        filename (str): Path or URL (``https://...``) of the file.
        map_location (str | torch.device, optional): Device of the tensors. Functions
            and dicts are ignored, since they map storages. Defaults to None, which
            means the CPU.

    Returns:
        dict: The checkpoint.
    """
    on_device = isinstance(map_location, (str, torch.device))
    with get_local_path(filename) as local:
        path = Path(local).expanduser()
        return read_safetensors(path, map_location if on_device else 'cpu')


def load_from_hub(filename: str, map_location: Any = None) -> Any:
    """Load a checkpoint from the Hugging Face Hub for mmengine.

    Args:
        filename (str): See :func:`local_checkpoint`.
        map_location (str | torch.device | callable | dict, optional): See
            ``torch.load``. Defaults to None.

    Returns:
        Any: The checkpoint.
    """
    local = str(local_checkpoint(filename))
    return CheckpointLoader.load_checkpoint(local, map_location)


def register_loaders() -> None:
    """Register the loaders of this module in mmengine."""
    for prefix, loader in (
        (r'.*\.safetensors$', load_from_safetensors),
        # mmengine tries patterns in reverse alphabetical order; this one precedes its
        # own pattern for URLs
        (r'https?://.*\.safetensors(\?.*)?$', load_from_safetensors),
        ('hf://', load_from_hub),
    ):
        CheckpointLoader.register_scheme(prefix, loader, force=True)
