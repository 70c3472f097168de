"""Load networks and images for the tools in tools/analysis."""

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

    This sets the default scope to that of the config.

    Args:
        config (str | Path): Path of the config.
        checkpoint (str | Path): Path of the checkpoint or bare state dict.
        cfg_options (dict, optional): Changes to the config. Defaults to None.
        device (str, optional): Device to run on. Defaults to None: an accelerator if
            there is one, or else the CPU.

    Returns:
        tuple[Config, nn.Module]: The config and the model, in eval mode.

    Raises:
        SystemExit: If a file is missing or invalid.
        ValueError: If the checkpoint does not fit the network.
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
    """Find images in folders and among files.

    Args:
        paths (Sequence[str | Path]): Files and folders. Subfolders are not searched.

    Returns:
        list[Path]: The images; those of a folder are sorted by name.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder has no image.
    """
    images = []
    for path in map(Path, paths):
        if path.is_dir():
            members = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not members:
                raise FileNotFoundError(
                    f'there is no image in {path}; allowed are {", ".join(SUFFIXES)}'
                )
            images += members
        elif path.is_file():
            images.append(path)
        else:
            raise FileNotFoundError(f'there is no image or folder {path}')
    return images


def evenly(count: int, number: int) -> List[int]:
    """Choose ``number`` evenly spaced indices out of ``count``.

    The first images of a data set that is sorted by class, such as ImageNet, would only
    show the first classes.
    """
    number = min(count, number)
    return [int(x) for x in np.arange(number) * count // max(number, 1)]


def image_pipeline(cfg: Config) -> Compose:
    """Build the test pipeline of a config for images without annotations.

    Args:
        cfg (Config): Config of an mmdet or mmpretrain project.

    Returns:
        Compose: Pipeline from ``dict(img_path=..., img_id=...)`` to the input of the
        model's data preprocessor.

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
            f'{cfg.filename} has no test pipeline; it needs test_dataloader, '
            'val_dataloader or test_pipeline'
        )
    return Compose([step for step in steps if 'Annotations' not in str(step['type'])])


def image_batches(pipeline: Compose, images: Sequence[Path]) -> Iterator[dict]:
    """Load each image as a batch of one.

    Args:
        pipeline (Compose): See :func:`image_pipeline`.
        images (Sequence[Path]): The images.

    Yields:
        dict: Input of the model's data preprocessor.

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
        ) as error:  # depends on the content of the file
            raise ValueError(f'{image} cannot be read: {error}') from error
        if data is None:
            raise ValueError(f'{image} cannot be read')
        yield pseudo_collate([data])


def as_colours(image: np.ndarray) -> np.ndarray:
    """Convert an image with any number of channels to three channels for drawing.

    Args:
        image (ndarray): (H, W) or (H, W, C). Values above 255, as in 16-bit images,
            are scaled down.

    Returns:
        ndarray: (H, W, 3), uint8: the first three channels, or the first one as gray
        if there are fewer than three. It warns if it drops channels.
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
        text = f'a picture shows only the first {shown} of {channels} channels'
        warnings.warn(text, stacklevel=3)
    return image[..., :shown].repeat(3 // shown, axis=2)


def input_picture(batch: dict) -> np.ndarray:
    """Picture of a batch's first image, as the network sees it before normalization.

    Args:
        batch (dict): A batch from a data loader.

    Returns:
        ndarray: (h, w, 3), RGB from 0 to 1; see :func:`as_colours`.
    """
    image = batch['inputs'][0].float().numpy().transpose(1, 2, 0)
    # The toolboxes' pipelines read images as BGR
    image = _three(image)[..., ::-1]
    if batch['inputs'][0].dtype == torch.uint8:
        image = image / 255
    else:
        image = (image - image.min()) / (np.ptp(image) + 1e-8)
    return np.ascontiguousarray(image, np.float32)


def validation_loader(cfg: Config, number: int) -> DataLoader:
    """Build a loader of evenly spaced images from a config's validation data.

    Args:
        cfg (Config): Config of a run.
        number (int): Maximum number of images.

    Returns:
        DataLoader: The loader, with the config's batch size.

    Raises:
        ValueError: If the config has no validation data.
        OSError: If the data are missing.
    """
    loader = copy.deepcopy(cfg.get('val_dataloader') or {})
    if not loader.get('dataset'):
        raise ValueError(
            f'{cfg.filename} has no val_dataloader; give images or a folder of images '
            'with --data'
        )
    dataset = DATASETS.build(loader.dataset)
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    if not len(dataset):
        raise ValueError(f'the validation data of {cfg.filename} have no image')
    indices = evenly(len(dataset), number)
    loader.update(
        dataset=Subset(dataset, indices),
        sampler=dict(type='DefaultSampler', shuffle=False),
        drop_last=False,
    )
    loader.pop('batch_sampler', None)
    if len(indices) <= 16:  # starting workers would take longer
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
        ValueError: If the device does not exist.
    """
    if name is not None:
        try:
            torch.zeros(1, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split('\n')[0]
            raise ValueError(f'--device={name}: {reason}') from error
    return name
