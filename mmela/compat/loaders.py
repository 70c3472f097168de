"""Checkpoints of safetensors and on the Hugging Face Hub, for all that load one.

``load_from``, ``init_cfg``, test tools and inferencers of the toolboxes all ask
mmengine's ``CheckpointLoader``, which finds a reader by the form of the path. So
the readers here are registered there, and nothing else needs to know them.
"""

import json
import re
from pathlib import Path
from typing import Any, Dict, Union

import torch
from mmengine.fileio import get_local_path
from mmengine.runner import CheckpointLoader
from torch import Tensor

# What a repository on the Hub holds, written by `mmela push`
HUB_CHECKPOINT = 'model.safetensors'
_HUB_PATH = re.compile(r'hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?')
# Under which a safetensors file has the `meta` of a checkpoint
_META = 'mmela.meta'


def is_on_hub(path: Union[str, Path]) -> bool:
    """Whether a path is of the form ``hf://USER/REPO[@REVISION][/FILE]``."""
    return str(path).startswith('hf://')


def local_checkpoint(path: Union[str, Path]) -> Path:
    """The file of a checkpoint; one on the Hub is downloaded, once.

    Args:
        path (str | Path): A file, or ``hf://USER/REPO[@REVISION][/FILE]``. The
            file in a repository is ``model.safetensors`` if none is named.

    Returns:
        Path: The file, of the Hub's cache if it is from there.

    Raises:
        ImportError: If huggingface_hub is needed and not installed.
        OSError: If the Hub cannot be reached or has no such file.
        ValueError: If the path is not of that form.
    """
    if not is_on_hub(path):
        return Path(path)
    match = _HUB_PATH.fullmatch(str(path))
    if match is None:
        raise ValueError(f'{path} is not of the form hf://USER/REPO[@REVISION][/FILE]')
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ImportError(f'{path} needs `pip install huggingface_hub`') from error
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
        device (str | torch.device): Where the tensors go. Defaults to 'cpu'.

    Returns:
        dict[str, dict]: ``state_dict``, and ``meta``, which is empty in files
        that mmela has not written.

    Raises:
        ImportError: If safetensors is not installed.
        OSError: If the file cannot be opened.
        ValueError: If it is damaged.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f'{path} needs `pip install safetensors`') from error
    with open(path, 'rb'):
        pass  # so that what goes wrong from here on is due to its content
    try:
        with safe_open(str(path), framework='pt', device=str(device)) as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = json.loads((file.metadata() or {}).get(_META, '{}'))
    except Exception as error:  # bytes of a file may make a reader raise anything
        raise ValueError(f'{path} is no checkpoint or is damaged') from error
    if not isinstance(meta, dict):
        raise ValueError(f'{path} is damaged: {_META} is no object')
    return dict(meta=meta, state_dict=state_dict)


def write_safetensors(
    path: Union[str, Path], state_dict: Dict[str, Tensor], meta: dict
) -> None:
    """Write a checkpoint as a safetensors file.

    Args:
        path (str | Path): The file.
        state_dict (dict[str, Tensor]): The state dict.
        meta (dict): What the checkpoint tells about its training, such as the
            names of the classes; numbers, texts and containers of them.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If the state dict holds something else than tensors.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f'{path} needs `pip install safetensors`') from error
    for key, value in state_dict.items():
        if not torch.is_tensor(value):
            raise ValueError(
                f'{key} is a {type(value).__name__}: safetensors holds tensors alone'
            )
    # Copies, as it refuses tensors that share memory
    tensors = {k: v.contiguous().clone() for k, v in state_dict.items()}
    text = json.dumps(meta, default=lambda value: value.tolist())
    save_file(tensors, str(path), metadata={'format': 'pt', _META: text})


def load_from_safetensors(filename: str, map_location: Any = None) -> dict:
    """Load a safetensors file, for mmengine.

    Args:
        filename (str): The file, or its address (``https://...``).
        map_location (str | torch.device, optional): Where the tensors go;
            functions and dicts count for storages, which there are none of.
            Defaults to None, which means the CPU.

    Returns:
        dict: The checkpoint.
    """
    on_device = isinstance(map_location, (str, torch.device))
    with get_local_path(filename) as local:
        path = Path(local).expanduser()
        return read_safetensors(path, map_location if on_device else 'cpu')


def load_from_hub(filename: str, map_location: Any = None) -> Any:
    """Load a checkpoint of the Hugging Face Hub, for mmengine.

    Args:
        filename (str): As :func:`local_checkpoint` takes it.
        map_location (str | torch.device | callable | dict, optional): As that
            of ``torch.load``. Defaults to None.

    Returns:
        Any: The checkpoint.
    """
    local = str(local_checkpoint(filename))
    return CheckpointLoader.load_checkpoint(local, map_location)


def register_loaders() -> None:
    """Have mmengine load what this module reads."""
    for prefix, loader in (
        (r'.*\.safetensors$', load_from_safetensors),
        # mmengine asks the pattern that is last by name first: before its own
        (r'https?://.*\.safetensors(\?.*)?$', load_from_safetensors),
        ('hf://', load_from_hub),
    ):
        CheckpointLoader.register_scheme(prefix, loader, force=True)
