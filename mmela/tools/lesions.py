"""Make a segmentation data set of images with one lesion mask each.

`render` draws images of skin with one dark, ragged lesion, hairs, and marks that
are not lesions. `convert` scales a published data set such as Kvasir-SEG or ISIC
to one size, and splits it at random into training and validation images. Both
write

    OUT_DIR/images/{train,val}/NAME.png    the image
    OUT_DIR/masks/{train,val}/NAME.png     1 in the lesion, 0 elsewhere

for MMSegmentation's BaseSegDataset. The same arguments give the same data.
docs/segmentation.md describes the layout of published data sets.

Examples:
  mmela lesions render data/lesions
  mmela lesions convert data/kvasir \\
      --images Kvasir-SEG/images --masks Kvasir-SEG/masks
"""

import argparse
import os
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from mmela_light import rendering
from mmela_light.arguments import tool_parser

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff')
OPTIONS = rendering.options(train=96, val=32, size=96, smallest=32)
# Suffix that ISIC adds to the name of an image for its mask
MASK_ENDING = '_segmentation'

# An image (H, W, 3), BGR, and its mask (H, W) of 0 and 1, both uint8
Sample = Tuple[np.ndarray, np.ndarray]


# -- drawing -----------------------------------------------------------------


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Draw noise of about [-1, 1] that varies over ``size / cells`` pixels."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _ragged(
    rng: np.random.Generator, size: int, center: np.ndarray, radius: float
) -> np.ndarray:
    """Draw a blob as a map like a signed distance, negative inside; (H, W)."""
    ys, xs = np.mgrid[:size, :size].astype(np.float32)
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1, 1.6)
    dx, dy = xs - center[0], ys - center[1]
    along = (dx * np.cos(turn) + dy * np.sin(turn)) / stretch
    across = (dy * np.cos(turn) - dx * np.sin(turn)) * stretch**0.5
    angle = np.arctan2(across, along)
    edge = np.ones_like(angle)
    for order in range(2, 8):
        edge += (
            rng.uniform(-0.25, 0.25)
            / order
            * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
        )
    return np.hypot(along, across) - radius * edge


def _render(rng: np.random.Generator, size: int) -> Sample:
    """Draw one image and its mask."""
    skin = rng.uniform((110, 130, 170), (180, 195, 230))  # BGR
    image = np.empty((size, size, 3), np.float32)
    image[:] = skin
    shade = 14 * _smooth_noise(rng, size, 4) + 7 * _smooth_noise(
        rng, size, max(8, size // 6)
    )
    image += shade[..., None]

    # Marks that are not lesions: reddish, and lighter
    for _ in range(rng.integers(0, 4)):
        mark = _ragged(
            rng, size, rng.uniform(0, size, 2), rng.uniform(0.03, 0.09) * size
        )
        cover = 0.5 / (1 + np.exp(np.clip(mark, -30, 30) / (0.01 * size)))
        tint = skin * (0.75, 0.7, 0.95)
        image += cover[..., None] * (tint - image)

    center = rng.uniform(0.3, 0.7, 2) * size
    lesion = _ragged(rng, size, center, rng.uniform(0.1, 0.26) * size)
    mask = (lesion < 0).astype(np.uint8)
    # A soft border, and a colour that changes within the lesion
    cover = 1 / (1 + np.exp(np.clip(lesion, -30, 30) / (0.012 * size)))
    dark = skin * rng.uniform(0.3, 0.6, 3) + 25 * _smooth_noise(rng, size, 6)[..., None]
    image += cover[..., None] * (dark - image)

    for _ in range(rng.integers(0, 7)):  # hairs
        start, end = rng.uniform(0, size, (2, 2))
        bend = (start + end) / 2 + rng.uniform(-0.2, 0.2, 2) * size
        t = np.linspace(0, 1, 20)[:, None]
        points = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        cv2.polylines(
            image,
            [np.round(points * 16).astype(np.int32)],
            False,
            (rng.uniform(20, 60, 3)).tolist(),
            max(1, size // 100),
            cv2.LINE_AA,
            shift=4,
        )

    ys, xs = np.mgrid[:size, :size] / (size - 1) - 0.5
    image *= (1 - rng.uniform(0, 0.9) * (xs**2 + ys**2))[..., None]
    image += rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


# -- reading published data sets ------------------------------------------------


def _read(path: Path, flags: int) -> np.ndarray:
    # Through memory, because OpenCV cannot read from every path
    pixels = np.frombuffer(path.read_bytes(), np.uint8)
    image = cv2.imdecode(pixels, flags) if pixels.size else None
    if image is None:
        raise ValueError(f'{path} is not an image that OpenCV can read')
    return image


def _load(image_path: Path, mask_path: Path, size: int) -> Sample:
    """Read one image and its mask, and resize them."""
    image = _read(image_path, cv2.IMREAD_COLOR)
    mask = _read(mask_path, cv2.IMREAD_GRAYSCALE)
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f'{mask_path} has {mask.shape[1]} x {mask.shape[0]} pixels, but its image '
            f'has {image.shape[1]} x {image.shape[0]}'
        )
    if mask.max() == 1:
        mask = mask * 255
    # The masks of Kvasir-SEG are JPEG files, so they have values between 0 and 255
    mask = (mask > 127).astype(np.uint8)
    shape = (size, size)
    shrinks = max(image.shape[:2]) > size
    return (
        cv2.resize(
            image, shape, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        ),
        cv2.resize(mask, shape, interpolation=cv2.INTER_NEAREST),
    )


def _list_images(folder: Path) -> Dict[str, Path]:
    """List the images in a folder by stem."""
    if not folder.is_dir():
        raise FileNotFoundError(f'there is no folder {folder}')
    images: Dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            if path.stem in images:
                raise ValueError(f'{images[path.stem]} and {path} have the same name')
            images[path.stem] = path
    return images


def _pair(
    images: Sequence[os.PathLike], masks: Sequence[os.PathLike]
) -> List[Tuple[str, Path, Path]]:
    """Pair masks with their images: name, image and mask, sorted by name."""
    if len(images) != len(masks):
        raise ValueError(
            f'there are {len(images)} folders of images, but {len(masks)} of masks; '
            'give one folder of masks for each folder of images'
        )
    pairs: Dict[str, Tuple[str, Path, Path]] = {}
    for image_folder, mask_folder in zip(map(Path, images), map(Path, masks)):
        by_name = _list_images(image_folder)
        for stem, mask in _list_images(mask_folder).items():
            name = stem
            if name not in by_name and name.lower().endswith(MASK_ENDING):
                name = name[: -len(MASK_ENDING)]
            if name not in by_name:
                raise ValueError(f'{mask} has no image {name} in {image_folder}')
            if name in pairs:
                raise ValueError(
                    f'{pairs[name][2]} and {mask} are both masks of image {name}'
                )
            pairs[name] = (name, by_name[name], mask)
    if len(pairs) < 2:
        raise ValueError(
            f'{", ".join(map(str, images))} has {len(pairs)} images with a mask; at '
            'least 2 are needed, one of them for validation'
        )
    return [pairs[name] for name in sorted(pairs)]


# -- the data set ------------------------------------------------------------


def _write_all(
    out_dir: os.PathLike, samples: Sequence[Tuple[str, str, Callable[[], Sample]]]
) -> None:
    """Write a data set completely or not at all.

    Args:
        out_dir (str | Path): Its folder.
        samples (Sequence[tuple]): Split, name, and a function that makes image and
            mask, for each image.
    """
    from mmengine.utils import track_iter_progress

    with rendering.new_folder(out_dir) as new:
        for kind in ('images', 'masks'):
            for split in ('train', 'val'):
                (new / kind / split).mkdir(parents=True)
        for split, name, make in track_iter_progress(list(samples)):
            image, mask = make()
            rendering.write_png(new / 'images' / split / f'{name}.png', image)
            rendering.write_png(new / 'masks' / split / f'{name}.png', mask)


def _check_free(out_dir: os.PathLike) -> None:
    if rendering.is_taken(out_dir):
        raise FileExistsError(f'{out_dir} already exists; give a new or empty folder')


def render(
    out_dir: os.PathLike, train: int = 96, val: int = 32, size: int = 96, seed: int = 0
) -> Tuple[int, int]:
    """Draw a data set.

    Args:
        out_dir (str | Path): Folder of the data set, new or empty.
        train (int): Number of training images. Defaults to 96.
        val (int): Number of validation images. Defaults to 32.
        size (int): Width and height in pixels, 32 to 2048. Defaults to 96.
        seed (int): Random seed. Defaults to 0.

    Returns:
        tuple[int, int]: Numbers of training and of validation images.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is out of range.
        FileExistsError: If ``out_dir`` is not empty.
    """
    rendering.check(OPTIONS, train=train, val=val, size=size, seed=seed)
    _check_free(out_dir)

    def maker(split: str, index: int) -> Callable[[], Sample]:
        return lambda: _render(rendering.stream(seed, split, index), size)

    _write_all(
        out_dir,
        [
            (split, f'{index:06d}', maker(split, index))
            for split, count in (('train', train), ('val', val))
            for index in range(count)
        ],
    )
    return train, val


def convert(
    out_dir: os.PathLike,
    images: Sequence[os.PathLike],
    masks: Sequence[os.PathLike],
    train_share: float = 0.7,
    size: int = 256,
    seed: int = 42,
) -> Tuple[int, int]:
    """Convert a published data set.

    The mask of an image has the same name, with or without the suffix
    ``_segmentation``. Images without a mask are left out.

    Args:
        out_dir (str | Path): Folder of the data set, new or empty.
        images (Sequence[str | Path]): Folders of images.
        masks (Sequence[str | Path]): Their folders of masks, in the same order. A
            pixel belongs to the lesion if its value exceeds 127, or is 1 in a mask of
            0 and 1.
        train_share (float): Fraction of training images, in (0, 1). Defaults to 0.7.
        size (int): Width and height of the written images in pixels, 32 to 2048. The
            aspect ratio is not kept. Defaults to 256.
        seed (int): Seed of the split. Defaults to 42.

    Returns:
        tuple[int, int]: Numbers of training and of validation images.

    Raises:
        TypeError: If a number has the wrong type.
        ValueError: If a number is out of range, or a file does not fit.
        FileNotFoundError: If a folder does not exist.
        FileExistsError: If ``out_dir`` is not empty.
    """
    if not 0 < train_share < 1:
        raise ValueError(f'train_share={train_share} is not in (0, 1)')
    rendering.check(OPTIONS, size=size, seed=seed)
    _check_free(out_dir)
    pairs = _pair(images, masks)
    train = min(max(round(train_share * len(pairs)), 1), len(pairs) - 1)
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    training = set(order[:train])

    def maker(image: Path, mask: Path) -> Callable[[], Sample]:
        return lambda: _load(image, mask, size)

    _write_all(
        out_dir,
        [
            ('train' if index in training else 'val', name, maker(image, mask))
            for index, (name, image, mask) in enumerate(pairs)
        ],
    )
    return train, len(pairs) - train


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = tool_parser('lesions', __doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    sub = commands.add_parser(
        'render',
        help='draw a small data set',
        description='Example: mmela lesions render data/lesions',
    )
    rendering.add_options(sub, OPTIONS)

    sub = commands.add_parser(
        'convert',
        help='convert a published data set',
        description='Example: mmela lesions convert data/kvasir '
        '--images Kvasir-SEG/images --masks Kvasir-SEG/masks',
    )
    sub.add_argument('out_dir', help='folder of the data set')
    sub.add_argument(
        '--images', nargs='+', required=True, metavar='DIR', help='folders of images'
    )
    sub.add_argument(
        '--masks',
        nargs='+',
        required=True,
        metavar='DIR',
        help='folders of their masks, in the same order',
    )
    sub.add_argument(
        '--train-share',
        type=float,
        default=0.7,
        metavar='X',
        help='fraction of training images (default: 0.7)',
    )
    sub.add_argument(
        '--size',
        type=int,
        default=256,
        metavar='N',
        help='width and height of the written images in pixels (default: 256)',
    )
    sub.add_argument(
        '--seed',
        type=int,
        default=42,
        metavar='N',
        help='seed of the split (default: 42)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line, see ``--help``.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to those of the
            process.

    Raises:
        SystemExit: With a one-line error if an argument is invalid.
    """
    args = vars(parse_args(argv))
    command = dict(render=render, convert=convert)[args.pop('command')]
    try:
        train, val = command(**args)
    except (OSError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error
    print(f'{args["out_dir"]}: {train} training and {val} validation images')
