"""A network and its images, as the tools of tools/analysis take them."""

import copy
import warnings
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..convert.networks import build_network, load_fitting, open_network

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def load_network(
    config: Union[str, Path],
    checkpoint: Union[str, Path],
    cfg_options: Optional[dict] = None,
    device: Optional[str] = None,
) -> Tuple[Config, nn.Module]:
    """Build a network and load its checkpoint.

    The default scope becomes that of the config.

    Args:
        config (str | Path): Path of the config.
        checkpoint (str | Path): Path of the checkpoint or bare state dict.
        cfg_options (dict, optional): Changes of the config. Defaults to None.
        device (str, optional): Defaults to None: an accelerator if there is
            one, or else the CPU.

    Returns:
        tuple[Config, nn.Module]: The config and the model, in evaluation mode.

    Raises:
        SystemExit: If a file is missing or is not what it should be.
        ValueError: If the checkpoint is of another network.
    """
    cfg, _, state_dict = open_network(
        str(config), str(checkpoint), cfg_options=cfg_options
    )
    model = build_network(cfg.model, config)
    load_fitting(model, state_dict, config, checkpoint)
    model.to(device or get_device())
    model.eval()
    return cfg, model


def find_images(paths: Sequence[Union[str, Path]]) -> List[Path]:
    """Images in folders, and images given one by one.

    Args:
        paths (Sequence[str | Path]): Folders, which are not searched deeper,
            and files.

    Returns:
        list[Path]: The images; those of a folder by name.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder has no image.
    """
    images = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not found:
                raise FileNotFoundError(
                    f'there is no image in {path}; allowed are {", ".join(SUFFIXES)}'
                )
            images += found
        elif path.is_file():
            images.append(path)
        else:
            raise FileNotFoundError(f'no image or folder {path}')
    return images


def evenly(count: int, number: int) -> List[int]:
    """Indices of ``number`` of ``count`` things, evenly spaced.

    A data set that is sorted by class, such as ImageNet, would otherwise show
    its first classes alone.
    """
    number = min(count, number)
    return [int(x) for x in np.arange(number) * count // max(number, 1)]


def image_pipeline(cfg: Config) -> Compose:
    """The test pipeline of a config, for images without annotations.

    Args:
        cfg (Config): Config of an mmdet or mmpretrain project.

    Returns:
        Compose: From ``dict(img_path=..., img_id=...)`` to what the data
        preprocessor of the model takes.

    Raises:
        ValueError: If the config has no test pipeline.
    """
    steps = cfg.get('test_pipeline')
    for name in ('test_dataloader', 'val_dataloader'):
        dataset = (cfg.get(name) or {}).get('dataset')
        while dataset is not None:
            steps = dataset.get('pipeline') or steps
            dataset = dataset.get('dataset')
        if steps:
            break
    if not steps:
        raise ValueError(
            f'{cfg.filename} has no test pipeline: neither test_dataloader '
            'nor val_dataloader nor test_pipeline'
        )
    return Compose([step for step in steps if 'Annotations' not in str(step['type'])])


def image_batches(pipeline: Compose, images: Sequence[Path]) -> Iterator[dict]:
    """Each image as a batch of its own.

    Args:
        pipeline (Compose): See :func:`image_pipeline`.
        images (Sequence[Path]): The images.

    Yields:
        dict: What the data preprocessor of the model takes.

    Raises:
        ValueError: If an image cannot be read.
    """
    for index, image in enumerate(images):
        try:
            data = pipeline(dict(img_path=str(image), img_id=index))
        except (
            AssertionError,
            AttributeError,
            TypeError,
            ValueError,
            OSError,
        ) as error:  # whatever a file holds
            raise ValueError(f'{image} cannot be read: {error}') from error
        if data is None:
            raise ValueError(f'{image} cannot be read')
        yield pseudo_collate([data])


def as_colours(image: np.ndarray) -> np.ndarray:
    """What is drawn of an image of any number of channels.

    Args:
        image (ndarray): (H, W) or (H, W, C); values beyond 255, such as of 16 bits,
            are scaled.

    Returns:
        ndarray: (H, W, 3), uint8: the first three channels, or the first one, as
        gray, where there are fewer. A warning says so where channels are left out.
    """
    image = _three(image)
    if image.dtype != np.uint8:
        image = image * (255 / max(image.max(initial=0), 255))
        image = image.clip(0).astype(np.uint8)
    return image


def _three(image: np.ndarray) -> np.ndarray:
    image = image.reshape(*image.shape[:2], -1)
    channels = image.shape[2]
    shown = 3 if channels >= 3 else 1
    if channels > shown:
        text = f'of {channels} channels, a picture shows the first {shown}'
        warnings.warn(text, stacklevel=3)
    return image[..., :shown].repeat(3 // shown, axis=2)


def input_picture(batch: dict) -> np.ndarray:
    """The first image of a batch as the network sees it, before normalization.

    Args:
        batch (dict): What a data loader yields.

    Returns:
        ndarray: (h, w, 3), RGB from 0 to 1; see :func:`as_colours`.
    """
    image = batch['inputs'][0].float().numpy().transpose(1, 2, 0)
    # The pipelines of the toolboxes read images as BGR.
    image = _three(image)[..., ::-1]
    if batch['inputs'][0].dtype == torch.uint8:
        image = image / 255
    else:
        image = (image - image.min()) / (np.ptp(image) + 1e-8)
    return np.ascontiguousarray(image, np.float32)


def validation_loader(cfg: Config, number: int) -> DataLoader:
    """Loader of evenly spaced images of a config's validation data.

    Args:
        cfg (Config): Config of a run.
        number (int): Most images.

    Returns:
        DataLoader: Batches of at most the config's batch size.

    Raises:
        ValueError: If the config has no validation data.
        OSError: If the data are missing.
    """
    loader = copy.deepcopy(cfg.get('val_dataloader') or {})
    if not loader.get('dataset'):
        raise ValueError(
            f'{cfg.filename} has no val_dataloader; name images '
            'or a folder of images by --data'
        )
    dataset = DATASETS.build(loader.dataset)
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    if not len(dataset):
        raise ValueError(f'the validation data of {cfg.filename} are empty')
    indices = evenly(len(dataset), number)
    loader.update(
        dataset=Subset(dataset, indices),
        sampler=dict(type='DefaultSampler', shuffle=False),
        drop_last=False,
    )
    loader.pop('batch_sampler', None)
    if len(indices) <= 16:  # workers would take longer to start
        loader.update(num_workers=0, persistent_workers=False)
        loader.pop('prefetch_factor', None)
    return Runner.build_dataloader(loader, seed=0)


def check_device(name: Optional[str]) -> Optional[str]:
    """Check that a device exists.

    Args:
        name (str | None): Such as ``'cpu'`` or ``'cuda:0'``; None for any.

    Returns:
        str | None: The name.

    Raises:
        ValueError: If there is no such device.
    """
    if name is not None:
        try:
            torch.zeros(1, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split('\n')[0]
            raise ValueError(f'--device={name}: {reason}') from error
    return name
