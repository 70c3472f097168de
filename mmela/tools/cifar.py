"""Unpack an archive of CIFAR-10 or CIFAR-100 into what the configs read.

Two kinds of archives are known:

  cifar-10-python.tar.gz, cifar-100-python.tar.gz: the official ones. Their
    checksums are compared, and OUT gets the folder in them, which the configs
    *_cifar10.py and *_cifar100.py read.
  archives of image files, train/<class>/<name> and test/<class>/<name>: OUT
    gets these folders, which the configs *_cifar10-folder.py read.

Nothing is left behind when something goes wrong, and nothing is overwritten.

Example:
  mmela cifar cifar-10-python.tar.gz data/cifar10
  mmela cifar images.tar.xz data/cifar10_folder \\
      --per-class 100
"""

import hashlib
import re
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import List, Optional

from mmela_light.arguments import tool_parser

# Folder in the official archive, checksum of the archive
OFFICIAL = {
    'cifar-10-batches-py': 'c58f30108f718f92721af3b95e74349a',
    'cifar-100-python': 'eb9058c3a382ffc7106e4002c42a8d85',
}
IMAGE = re.compile(
    r'(?:\./)?(?P<split>train|test)/(?P<cls>[^/]+)/[^/]+\.(?:jpe?g|png)', re.IGNORECASE
)


def md5(path: Path) -> str:
    """MD5 checksum of a file, which CIFAR's authors publish."""
    digest = hashlib.md5()
    with open(path, 'rb') as file:
        for chunk in iter(lambda: file.read(1 << 20), b''):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, out: Path, per_class: Optional[int] = None) -> str:
    """Unpack an archive.

    Args:
        archive (Path): The archive.
        out (Path): Folder to write.
        per_class (int, optional): Only so many images of each class and split,
            the first by name; for archives of image files. Defaults to None,
            which means all.

    Returns:
        str: What was written, in words.

    Raises:
        FileExistsError: If the folder exists and is not empty.
        ValueError: If the archive cannot be read, is of another kind or has
            another checksum, or ``per_class`` is less than 1 or given for an
            official archive.
    """
    if per_class is not None and per_class < 1:
        raise ValueError(f'--per-class {per_class} is less than 1')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f'{out} exists already')
    try:
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.isfile() or m.isdir()]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f'{archive} cannot be read: {error}') from error

    folder = members[0].name.split('/')[0] if members else ''
    if folder in OFFICIAL:
        if per_class is not None:
            raise ValueError(
                '--per-class is for archives of image files; '
                f'{archive} is an official archive'
            )
        found = md5(archive)
        if found != OFFICIAL[folder]:
            raise ValueError(
                f'{archive} has the MD5 checksum {found}, the '
                f'official one {OFFICIAL[folder]}'
            )
        chosen, summary = members, f'{folder} with {len(members)} entries'
    else:
        chosen = choose_images(members, per_class)
        if not chosen:
            raise ValueError(
                f'{archive} is neither {" nor ".join(OFFICIAL)}, nor does it '
                'hold train/<class>/<name> and test/<class>/<name> images'
            )
        count = Counter(IMAGE.fullmatch(m.name)['split'] for m in chosen)
        summary = f'{count["train"]} images for training, {count["test"]} for testing'

    from mmengine.utils import ProgressBar

    out.parent.mkdir(parents=True, exist_ok=True)
    names = {m.name for m in chosen}
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        target = Path(temporary) / 'data'
        bar = ProgressBar(len(names))
        # In the order of the archive: a compressed one cannot be rewound
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name in names:
                    tar.extract(member, target, filter='data')
                    bar.update()
        print()
        if out.exists():
            out.rmdir()
        target.rename(out)
    return summary


def choose_images(
    members: List[tarfile.TarInfo], per_class: Optional[int]
) -> List[tarfile.TarInfo]:
    """Image files of an archive, up to so many per class and split."""
    images = sorted(
        (m for m in members if IMAGE.fullmatch(m.name)), key=lambda m: m.name
    )
    count: Counter = Counter()
    chosen = []
    for member in images:
        match = IMAGE.fullmatch(member.name)
        key = match['split'], match['cls']
        if per_class is None or count[key] < per_class:
            count[key] += 1
            chosen.append(member)
    return chosen


def main(argv: Optional[List[str]] = None) -> None:
    parser = tool_parser('cifar', __doc__)
    parser.add_argument('archive', type=Path)
    parser.add_argument('out', type=Path, help='folder to write')
    parser.add_argument(
        '--per-class',
        type=int,
        help='only so many images of each class and split, the first by name',
    )
    parser.add_argument(
        '--keep',
        action='store_true',
        help='do nothing where OUT holds something already, instead of failing',
    )
    args = parser.parse_args(argv)
    if args.keep and args.out.is_dir() and any(args.out.iterdir()):
        print(f'{args.out} is there already')
        return
    if not args.archive.is_file():
        raise SystemExit(f'error: no file {args.archive}')
    try:
        summary = unpack(args.archive, args.out, args.per_class)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error
    print(f'{args.out}: {summary}')
