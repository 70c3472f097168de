"""Convert a checkpoint of the MRLA, DLA or KCLA authors' code to mmela.

It reads checkpoints of their training scripts for CIFAR, ImageNet, COCO and medical
images, and prints the new name of each key and the config of the backbone. It loads
the result into the target network as a check; an unknown key is an error, so that
nothing gets lost.

Example:
  mmela published model_best.pth.tar mrla.pth
  mmela published resnet56.pth.tar dla.pth --head-dim 32
  mmela published faster_rcnn.pth mrla.pth --target detector
  mmela published unet.pth kcla.pth --target segmentor
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from mmela_light.arguments import tool_parser

# Keys under which the authors' scripts store the weights
WEIGHTS = ('state_dict', 'model', 'model_state_dict')
# Those of mmela.convert.published, which imports torch
ARCHS = (
    'mrla_base',
    'mrla_base_no_relu',
    'mrla_light',
    'mla',
    'mla_eq4',
    'linear',
    'linear_no_relu',
    'hydra',
    'focused',
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
        help='architecture (default: detected from the keys; required for some '
        'networks of MRLA and of KCLA on CIFAR, which have the same keys)',
    )
    parser.add_argument(
        '--head-dim',
        type=int,
        metavar='D',
        help='channels of a head; required if the tensors do not show it and the '
        'published code uses several values (default: the only published value)',
    )
    parser.add_argument(
        '--target',
        choices=TARGETS,
        default='classifier',
        help='target network: a classifier of MMPretrain, a detector of MMDetection or '
        'its backbone, a bare backbone of MMPretrain, or a segmentor of '
        'MMSegmentation (default: %(default)s)',
    )
    return parser.parse_args(argv)


def format_table(mapped: dict, dropped: dict) -> str:
    """Format a table of the keys, with one row for all blocks."""
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
        raise SystemExit(f'error: there is no file {args.src}')
    if Path(args.dst).exists():
        raise SystemExit(f'error: {args.dst} already exists')
    import torch

    from mmela.command_line import one_line, one_line_errors
    from mmela.convert.networks import read_state_dict
    from mmela.convert.published import NETWORKS, convert_published
    from mmela.files import replacing

    with one_line_errors(ImportError, OSError, ValueError):
        _, state_dict = read_state_dict(args.src, names=WEIGHTS)
    try:
        result = convert_published(state_dict, args.arch, args.target, args.head_dim)
    except (ImportError, ValueError) as error:
        raise SystemExit(f'error: {args.src}: {one_line(error)}') from error
    out = Path(args.dst)
    content = dict(meta=dict(backbone=result.backbone), state_dict=result.state_dict)
    with one_line_errors(OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            torch.save(content, temporary)
    print(format_table(result.mapped, result.dropped))
    print(
        f'{out}: {len(result.mapped)} of {len(state_dict)} tensors of a '
        f'{result.arch} network, {len(result.dropped)} dropped\n'
        f'backbone={result.backbone}'
    )
    if NETWORKS[result.arch].note:
        print(f'note: {NETWORKS[result.arch].note}')


if __name__ == '__main__':
    main()
