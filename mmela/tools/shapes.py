"""Render a small instance data set of shapes in COCO format.

Each of six shapes stands for a COCO category, and the annotation files list all
80 categories, so a config for COCO runs on the shapes if you only change
data_root:

  disc: sports ball   ring: donut        rectangle: book
  triangle: pizza     crescent: banana   cross: airplane

There are sparse scenes, crowded scenes with occlusions, crowd regions
(iscrowd=1) and empty images, on a textured and cluttered background. Boxes and
masks cover the visible part of an object; objects that would be almost hidden
are not drawn. Masks are polygons that follow the pixels exactly, crowd regions
are run lengths. The same arguments give the same pixels and annotations on every
machine.

The folder has the layout of COCO: annotations/instances_{train,val}2017.json,
train2017/ and val2017/.

Example:
  mmela shapes data/shapes --train 320 --val 60
"""

import argparse
import json
import os
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import cv2
import numpy as np
import shapely
from pycocotools import mask as mask_api

from mmela_light import rendering
from mmela_light.arguments import tool_parser

# Increase it when the same arguments give different data
VERSION = 1
GENERATOR = 'mmela make_shapes'
OPTIONS = rendering.options(train=320, val=60, size=192, smallest=64)

CATEGORIES = {
    'person': 'person',
    'vehicle': 'bicycle,car,motorcycle,airplane,bus,train,truck,boat',
    'outdoor': 'traffic light,fire hydrant,stop sign,parking meter,bench',
    'animal': 'bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe',
    'accessory': 'backpack,umbrella,handbag,tie,suitcase',
    'sports': 'frisbee,skis,snowboard,sports ball,kite,baseball bat,'
    'baseball glove,skateboard,surfboard,tennis racket',
    'kitchen': 'bottle,wine glass,cup,fork,knife,spoon,bowl',
    'food': 'banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake',
    'furniture': 'chair,couch,potted plant,bed,dining table,toilet',
    'electronic': 'tv,laptop,mouse,remote,keyboard,cell phone',
    'appliance': 'microwave,oven,toaster,sink,refrigerator',
    'indoor': 'book,clock,vase,scissors,teddy bear,hair drier,toothbrush',
}
# COCO numbers its categories up to 90 and skips these
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def _arc(start: float, stop: float, radius: float, x: float = 0) -> list:
    angles = np.linspace(start, stop, 49) * 2 * np.pi
    return [(x + radius * np.cos(a), radius * np.sin(a)) for a in angles]


# Outlines by COCO name, within the unit circle; a second outline is a hole
SHAPES = {
    'sports ball': [_arc(0, 1, 1)],
    'donut': [_arc(0, 1, 1), _arc(0, 1, .5)],
    'book': [[(-.85, -.53), (.85, -.53), (.85, .53), (-.85, .53)]],
    'pizza': [[(1, 0), (-.5, -.87), (-.5, .87)]],
    # The inner arc goes through the tips of the outer one
    'banana': [_arc(.125, .875, 1) + _arc(.809, .191, .76, .424)],
    'airplane': [[(-1, -.3), (-.3, -.3), (-.3, -1), (.3, -1), (.3, -.3),
                  (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3),
                  (-1, .3)]],
}  # yapf: disable


def coco_categories() -> List[dict]:
    """The 80 categories of COCO in the form of its annotation files."""
    ids = (i for i in range(1, 91) if i not in UNUSED_IDS)
    return [
        dict(supercategory=group, id=next(ids), name=name)
        for group, names in CATEGORIES.items()
        for name in names.split(',')
    ]


# -- one image ---------------------------------------------------------------


def _draw_mask(rng, name: str, size: int, center, radius: float) -> np.ndarray:
    """Draw the mask of a shape, (size, size), rotated and squeezed at random."""
    angle = rng.random() * 2 * np.pi
    cos, sin = np.cos(angle), np.sin(angle)
    squeeze = 0.75 + 0.25 * rng.random()
    mask = np.zeros((size, size), bool)
    for outline in SHAPES[name]:
        points = np.array(outline) * [radius, radius * squeeze]
        points = points @ [[cos, sin], [-sin, cos]] + center
        # Round to 1/16 pixel, to remove differences between math libraries. Do not
        # fill with OpenCV, whose versions differ at the edges.
        points = np.rint(points * 16) / 16
        rle = mask_api.frPyObjects([points.ravel().tolist()], size, size)
        mask ^= mask_api.decode(mask_api.merge(rle)).astype(bool)
    return mask


def _draw_ground(rng, size: int) -> np.ndarray:
    """Draw a background, (size, size, 3), of coarse and fine texture and lines."""
    image = np.full((size, size, 3), rng.integers(40, 180, 3), np.int16)
    for cells, contrast in ((3, 60), (12, 30), (48, 20)):
        grid = rng.integers(0, contrast, (cells, cells, 3)).astype(np.uint8)
        image += cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR_EXACT)
    image = image.clip(0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 6)):
        start, end = rng.integers(0, size, (2, 2)).tolist()
        cv2.line(image, start, end, rng.integers(0, 256, 3).tolist(), 1)
    return image


def _paint(rng, image: np.ndarray, mask: np.ndarray) -> None:
    """Fill a mask with a contrasting colour, plain or striped."""
    ground = image[mask].mean(0).round()
    color = ground
    while np.abs(color - ground).sum() < 150:
        color = rng.integers(0, 256, 3)
    image[mask] = color
    if rng.random() < 0.4:
        width = rng.integers(2, 6)
        ys, xs = np.nonzero(mask)
        stripe = (xs + ys * rng.integers(-1, 2)) // width % 2 == 0
        image[ys[stripe], xs[stripe]] = color * 3 // 4


def _place(
    rng,
    free: np.ndarray,
    low: float,
    high: float,
    middle,
    spread,
    name: Optional[str] = None,
):
    """Place one object behind all others.

    Args:
        rng (numpy.random.Generator): Random generator.
        free (ndarray): Pixels, (size, size), that nothing covers yet. The pixels of
            the object are removed from it.
        low (float): Minimum radius, in pixels.
        high (float): Maximum radius, in pixels.
        middle (ndarray): Centre of the objects, (x, y) in pixels.
        spread (float): Maximum distance from the centre, in pixels.
        name (str, optional): Category. Defaults to a random one.

    Returns:
        tuple | None: Category and visible mask; None if too little of the object
        would be visible.
    """
    name = name or list(SHAPES)[rng.integers(len(SHAPES))]
    radius = low + (high - low) * rng.random()
    center = middle + (rng.random(2) * 2 - 1) * spread
    mask = _draw_mask(rng, name, len(free), center, radius)
    visible = mask & free
    if visible.sum() < max(0.3 * mask.sum(), 0.4 * radius**2):
        return None
    free &= ~mask
    return name, visible


def _render(rng, size: int, index: int):
    """Draw an image, (size, size, 3), and its objects: (name, mask, iscrowd)."""
    free = np.ones((size, size), bool)
    objects, parts = [], []
    image = _draw_ground(rng, size)
    whole = np.array([size / 2, size / 2]), 0.45 * size
    # In turns, so that small sets have every kind of scene, too
    if index % 16 == 5:
        count = 0
    elif index % 2:
        count, whole = rng.integers(6, 11), (whole[0], 0.35 * size)
    else:
        count = rng.integers(1, 5)
    for _ in range(count):
        objects.append(_place(rng, free, 0.07 * size, 0.2 * size, *whole))
    if index % 8 == 2:
        name = list(SHAPES)[rng.integers(len(SHAPES))]
        middle = rng.integers(size // 5, size - size // 5, 2)
        for _ in range(25):
            parts.append(
                _place(rng, free, 0.025 * size, 0.035 * size, middle, 0.15 * size, name)
            )

    objects = [(*placed, 0) for placed in objects if placed]
    parts = [placed[1] for placed in parts if placed]
    for mask in [mask for _, mask, _ in objects] + parts:
        _paint(rng, image, mask)
    if parts:
        objects.append((name, np.logical_or.reduce(parts), 1))
    image = image + rng.integers(-8, 9, image.shape)
    return image.clip(0, 255).astype(np.uint8), objects


# -- its annotations ---------------------------------------------------------


def mask_to_polygons(mask: np.ndarray) -> List[List[int]]:
    """Outline a mask along the edges of its pixels.

    Args:
        mask (ndarray): Mask (h, w).

    Returns:
        list[list[int]]: Polygons without holes (x, y, x, y, ...), in pixels, which
        pycocotools converts back to exactly this mask. A part with a hole is cut in
        two.
    """
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))))
    ys, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    runs = shapely.box(starts, ys, stops, ys + 1)
    todo, polygons = [shapely.union_all(runs)], []
    while todo:
        shape = todo.pop()
        if shape.geom_type == 'Polygon' and not shape.interiors:
            # In this form a polygon starts at a corner in every GEOS version
            shape = shape.normalize().simplify(0)
            points = np.array(shape.exterior.coords)[:-1]
            polygons.append(points.astype(int).ravel().tolist())
        elif shape.geom_type == 'Polygon':
            left, _, right, _ = shape.interiors[0].bounds
            cut = (left + right + 1) // 2
            left, top, right, bottom = shape.bounds
            todo.append(shape & shapely.box(left, top, cut, bottom))
            todo.append(shape & shapely.box(cut, top, right, bottom))
        else:  # several parts, and lines where a cut met an edge
            todo += [g for g in shape.geoms if g.area]
    return sorted(polygons)


def mask_to_counts(mask: np.ndarray) -> List[int]:
    """Compute run lengths of a mask in COCO's format for crowd regions.

    Args:
        mask (ndarray): Mask (h, w).

    Returns:
        list[int]: Lengths in pixels, column by column: outside, inside, outside and
        so on.
    """
    flat = mask.ravel(order='F')
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return [0] + counts if flat[0] else counts


def _annotate(name: str, mask: np.ndarray, iscrowd: int) -> dict:
    ys, xs = np.nonzero(mask)
    x, y = int(xs.min()), int(ys.min())
    if iscrowd:
        segmentation = dict(counts=mask_to_counts(mask), size=list(mask.shape))
    else:
        segmentation = mask_to_polygons(mask)
    ids = {c['name']: c['id'] for c in coco_categories()}
    return dict(
        segmentation=segmentation,
        area=int(mask.sum()),
        iscrowd=iscrowd,
        bbox=[x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y],
        category_id=ids[name],
    )


# -- the data set ------------------------------------------------------------


def _ann_file(folder: Path, split: str) -> Path:
    return folder / 'annotations' / f'instances_{split}2017.json'


def _write_split(folder: Path, split: str, count: int, info: dict) -> None:
    images, annotations = [], []
    size, seed = info['parameters']['size'], info['parameters']['seed']
    image_folder = folder / f'{split}2017'
    image_folder.mkdir(parents=True)
    for index in range(count):
        image, objects = _render(rendering.stream(seed, split, index), size, index)
        image_id = index + 1
        file_name = f'{image_id:012d}.png'
        rendering.write_png(image_folder / file_name, image)
        images.append(
            dict(id=image_id, file_name=file_name, height=size, width=size, license=1)
        )
        for item in objects:
            annotations.append(
                dict(id=len(annotations) + 1, image_id=image_id, **_annotate(*item))
            )
    path = _ann_file(folder, split)
    path.parent.mkdir(exist_ok=True)
    with open(path, 'w', encoding='utf-8', newline='\n') as file:
        json.dump(
            dict(
                info=info,
                licenses=[dict(id=1, name='Apache License 2.0', url='')],
                images=images,
                annotations=annotations,
                categories=coco_categories(),
            ),
            file,
        )


def _existing(folder: Path) -> Dict[str, Optional[dict]]:
    """``info`` of the splits of an existing data set."""
    infos = {}
    for split in ('train', 'val'):
        infos[split] = None
        try:
            data = json.loads(_ann_file(folder, split).read_text('utf-8'))
            info = data['info']
            if info['generator'] == GENERATOR and all(
                (folder / f'{split}2017' / image['file_name']).is_file()
                for image in data['images']
            ):
                infos[split] = info
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # missing, or not from this tool
    return infos


def make_shapes(
    out_dir: os.PathLike,
    train: int = 320,
    val: int = 60,
    size: int = 192,
    seed: int = 0,
    force: bool = False,
) -> bool:
    """Render a data set of shapes, unless the same one already exists.

    Args:
        out_dir (str | Path): Folder of the data set, which is written completely or
            not at all.
        train (int): Number of training images. Defaults to 320.
        val (int): Number of validation images. Defaults to 60.
        size (int): Width and height of the images, in pixels, 64 to 2048.
            Defaults to 192.
        seed (int): Random seed. Defaults to 0.
        force (bool): Replace a data set that this tool made with other arguments, or
            that is incomplete. Nothing else is ever replaced. Defaults to False.

    Returns:
        bool: True if it was rendered, False if it already existed.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is out of range.
        FileExistsError: If ``out_dir`` has something else.
    """
    parameters = dict(train=train, val=val, size=size, seed=seed)
    rendering.check(OPTIONS, **parameters)
    info = dict(
        description='Rendered shapes that stand for COCO categories',
        generator=GENERATOR,
        version=str(VERSION),
        parameters=parameters,
    )

    out_dir = Path(out_dir).absolute()
    occupied = rendering.is_taken(out_dir)
    if occupied:
        existing = _existing(out_dir)
        if existing == dict(train=info, val=info):
            return False
        infos = [i for i in existing.values() if i]
        if not infos:
            raise FileExistsError(
                f'{out_dir} exists, but is not a data set of this tool; give a new or '
                'empty folder'
            )
        if not force:
            raise FileExistsError(
                f'{out_dir} has shapes of version {infos[0].get("version")!r} with '
                f'{infos[0].get("parameters")}, perhaps incomplete, but you asked for '
                f'version {VERSION} with {parameters}. Use --force to replace them, or '
                'give another folder'
            )

    try:
        with rendering.new_folder(out_dir, replace=occupied) as new:
            _write_split(new, 'train', train, info)
            _write_split(new, 'val', val, info)
    except FileExistsError:
        if _existing(out_dir) == dict(train=info, val=info):
            return False  # another process has rendered the same one meanwhile
        raise
    return True


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = tool_parser('shapes', __doc__)
    rendering.add_options(parser, OPTIONS)
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace shapes made with other arguments; other folders are never '
        'replaced',
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
    args = parse_args(argv)
    try:
        rendered = make_shapes(**vars(args))
    except (OSError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error
    print(
        f'{args.out_dir}: {args.train} training and {args.val} validation '
        f'images {"rendered" if rendered else "already exist"}'
    )
