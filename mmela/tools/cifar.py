"""Unpack an archive of CIFAR-10 or CIFAR-100 for the configs.

It supports two kinds of archives:

  cifar-10-python.tar.gz, cifar-100-python.tar.gz: the official ones. The tool
    checks their checksums and unpacks their folder to OUT, for the configs
    *_cifar10.py and *_cifar100.py.
  archives of image files, train/<class>/<name> and test/<class>/<name>: the
    tool unpacks these folders to OUT, for the configs *_cifar10-folder.py.

It never overwrites files, and leaves nothing behind after an error.

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
    """MD5 checksum of a file, the kind that CIFAR's authors publish."""
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
        per_class (int, optional): For archives of image files, the number of images
            per class and split, the first ones by name. Defaults to None, which
            means all.

    Returns:
        str: Summary of the written files.

    Raises:
        FileExistsError: If the folder exists and is not empty.
        ValueError: If the archive cannot be read, is of another kind or has a wrong
            checksum, or if ``per_class`` is less than 1 or given for an official
            archive.
    """
    if per_class is not None and per_class < 1:
        raise ValueError(f'--per-class {per_class} is less than 1')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f'{out} already exists; give a new or empty folder')
    try:
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.isfile() or m.isdir()]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f'{archive} cannot be read: {error}') from error

    folder = members[0].name.split('/')[0] if members else ''
    if folder in OFFICIAL:
        if per_class is not None:
            raise ValueError(
                f'--per-class is for archives of image files, but {archive} is an '
                'official archive'
            )
        checksum = md5(archive)
        if checksum != OFFICIAL[folder]:
            raise ValueError(
                f'{archive} has the MD5 checksum {checksum}, but the official one has '
                f'{OFFICIAL[folder]}; download it again'
            )
        chosen, summary = members, f'{folder} with {len(members)} entries'
    else:
        chosen = choose_images(members, per_class)
        if not chosen:
            raise ValueError(
                f'{archive} is neither {" nor ".join(OFFICIAL)}, nor does it have '
                'images train/<class>/<name> and test/<class>/<name>'
            )
        count = Counter(IMAGE.fullmatch(m.name)['split'] for m in chosen)
        summary = f'{count["train"]} images for training, {count["test"]} for testing'

    from mmengine.utils import ProgressBar

    out.parent.mkdir(parents=True, exist_ok=True)
    names = {m.name for m in chosen}
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        target = Path(temporary) / 'data'
        bar = ProgressBar(len(names))
        # In the order of the archive, because a compressed one cannot be rewound
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
    """Choose image files of an archive, at most ``per_class`` per class and split."""
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
        help='number of images per class and split, the first ones by name (default: '
        'all)',
    )
    parser.add_argument(
        '--keep',
        action='store_true',
        help='do nothing if OUT already has files, instead of failing',
    )
    args = parser.parse_args(argv)
    if args.keep and args.out.is_dir() and any(args.out.iterdir()):
        print(f'{args.out} already exists')
        return
    if not args.archive.is_file():
        raise SystemExit(f'error: there is no file {args.archive}')
    try:
        summary = unpack(args.archive, args.out, args.per_class)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error
    print(f'{args.out}: {summary}')
