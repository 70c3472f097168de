"""Code shared by the commands that render a data set."""

import argparse
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

import cv2
import numpy as np

# Default, minimum, maximum and help of each option by name
Options = Dict[str, Tuple[int, int, Optional[int], str]]


def options(
    train: int, val: int, size: int, smallest: int, largest: int = 2048
) -> Options:
    """Define the options of a command that renders.

    Args:
        train (int): Default number of training images.
        val (int): Default number of validation images.
        size (int): Default width and height in pixels.
        smallest (int): Minimum size.
        largest (int): Maximum size. Defaults to 2048.

    Returns:
        dict: Default, minimum, maximum and help of each option by name.
    """
    pixels = f'width and height in pixels, {smallest} to {largest}'
    return dict(
        train=(train, 1, None, 'number of training images'),
        val=(val, 1, None, 'number of validation images'),
        size=(size, smallest, largest, pixels),
        seed=(0, 0, None, 'random seed'),
    )


def add_options(parser: argparse.ArgumentParser, options: Options) -> None:
    """Add the folder and these options to a parser."""
    parser.add_argument('out_dir', help='folder of the data set')
    for name, (default, _, _, text) in options.items():
        parser.add_argument(
            f'--{name}',
            type=int,
            default=default,
            metavar='N',
            help=f'{text} (default: {default})',
        )


def check(options: Options, **values: int) -> None:
    """Check the values of options.

    Raises:
        TypeError: If a value is not an integer.
        ValueError: If a value is out of range.
    """
    for name, value in values.items():
        _, low, high, _ = options[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f'{name} must be an integer, got {value!r}')
        if value < low or (high is not None and value > high):
            allowed = f'at least {low}' if high is None else f'{low} to {high}'
            raise ValueError(f'{name} must be {allowed}, got {value}')


def stream(seed: int, split: str, index: int) -> np.random.Generator:
    """Create the random generator of one image.

    Each image has its own, so that its content does not depend on the number and order
    of the images.
    """
    return np.random.default_rng([seed, split == 'val', index])


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image, (H, W) or (H, W, 3)."""
    # OpenCV itself cannot write to every path
    done, png = cv2.imencode('.png', pixels)
    if not done:
        raise OSError(f'OpenCV cannot encode {path.name}')
    path.write_bytes(png.tobytes())


def is_taken(path: os.PathLike) -> bool:
    """Whether a path exists and is not an empty folder."""
    path = Path(path)
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


@contextmanager
def new_folder(out_dir: os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Create a folder that appears complete or not at all.

    Args:
        out_dir (str | Path): The folder. It must not exist, or be empty.
        replace (bool): Replace an existing folder, and restore it if something fails.
            Defaults to False.

    Yields:
        Path: Temporary folder to write to.

    Raises:
        FileExistsError: If another process has written to ``out_dir``.
    """
    # Make it absolute, because '.' has no name for the temporary folder
    out_dir = Path(out_dir).absolute()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f'.{out_dir.name}-', dir=out_dir.parent
    ) as temp:
        new, old = Path(temp) / 'new', Path(temp) / 'old'
        new.mkdir()
        yield new
        try:
            if replace:
                out_dir.rename(old)
            elif out_dir.is_dir():
                with suppress(FileNotFoundError):
                    out_dir.rmdir()
            new.rename(out_dir)
        except OSError as error:
            if old.exists() and not out_dir.exists():
                old.rename(out_dir)
            raise FileExistsError(
                f'another process has written to {out_dir} while the data set was '
                'rendered, so nothing was kept; give a new folder'
            ) from error
