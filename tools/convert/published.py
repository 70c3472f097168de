"""Convert a checkpoint of the MRLA or KCLA authors' code to mmela.

Reads what their training scripts for CIFAR, ImageNet and COCO write, and says
what becomes of each key. A key that has no place in mmela's network is an
error, so nothing gets lost. Prints the config of the backbone; mind its
`head_dim`: no tensor of MRLA tells it, it is what their code sets.

Example:
  mmela published model_best.pth.tar mrla.pth
  mmela published faster_rcnn.pth mrla.pth --target detector
  mmela published unet.pth kcla.pth --target segmentor
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from mmela_light.arguments import tool_parser

# Those of mmela.convert.published, which imports torch
ARCHS = (
    'mrla_base',
    'mrla_base_no_relu',
    'mrla_light',
    'mla',
    'mla_eq4',
    'kcla',
    'kcla_first',
    'kcla_unet',
    'dla_light',
    'dla_base',
    'dia',
    'deit_mrla_base',
    'deit_mrla_light',
)
TARGETS = ('classifier', 'detector', 'backbone', 'segmentor')


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('published', __doc__)
    parser.add_argument('src', help='published checkpoint')
    parser.add_argument('dst', help='checkpoint to write')
    parser.add_argument(
        '--arch',
        choices=ARCHS,
        help='architecture (default: told from the keys; mrla_base, '
        'mrla_base_no_relu and mla have the same keys, so one must be said)',
    )
    parser.add_argument(
        '--target',
        choices=TARGETS,
        default='classifier',
        help='what the result is for: a classifier of MMPretrain, a detector '
        'of MMDetection or its backbone, a bare backbone of MMPretrain, or a '
        'segmentor of MMSegmentation (default: %(default)s)',
    )
    return parser.parse_args(argv)


def format_table(mapped: dict, dropped: dict) -> str:
    """Table of the keys, in which a row stands for all blocks."""
    from mmela.command_line import one_line

    def pattern(key):
        blocks = r'(layer|stages\.)\d+\.(layers\.|attention\.|ModuleList\.)?\d+\.'
        return re.sub(blocks, r'\1*.\2*.', one_line(key))

    rows = Counter((pattern(old), '-> ' + pattern(new)) for old, new in mapped.items())
    rows.update((pattern(old), 'dropped: ' + why) for old, why in dropped.items())
    width = max(len(old) for old, _ in rows)
    return '\n'.join(
        f'{count:4d}  {old:{width}}  {becomes}'
        for (old, becomes), count in rows.items()
    )


def main(argv=None) -> None:
    args = parse_args(argv)
    if not Path(args.src).is_file():
        raise SystemExit(f'error: no file {args.src}')
    if Path(args.dst).exists():
        raise SystemExit(f'error: {args.dst} exists already')
    import torch

    from mmela.command_line import one_line
    from mmela.convert.networks import read_state_dict
    from mmela.convert.published import (
        convert_published,
        map_published_keys,
        published_backbone,
        strip_module,
    )

    try:
        _, state_dict = read_state_dict(args.src, names=('state_dict', 'model'))
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f'error: {one_line(error)}') from error
    try:
        state_dict = strip_module(state_dict)
        keys = map_published_keys(state_dict, args.arch, args.target)
        converted, dropped = convert_published(state_dict, keys.arch, args.target)
        backbone = published_backbone(converted, keys.arch)
    except ValueError as error:
        raise SystemExit(f'error: {args.src}: {one_line(error)}') from error
    out = Path(args.dst)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(meta=dict(backbone=backbone), state_dict=converted), out)
    print(format_table(keys.mapped, dropped))
    print(
        f'{out}: {len(keys.mapped)} of {len(state_dict)} tensors of a '
        f'{keys.arch} network, {len(dropped)} dropped\nbackbone={backbone}'
    )
    if keys.arch == 'kcla_unet':
        print('decode_head=dict(scale=2), which enlarges as the published decoder')


if __name__ == '__main__':
    main()
