"""Convert a checkpoint of the MRLA, DLA or KCLA authors' code to mmela.

Reads what their training scripts for CIFAR, ImageNet, COCO and medical images
write, and says what becomes of each key. The result has been loaded into the
network that it is for; a key that has no place there is an error, so nothing gets
lost. Prints the config of the backbone.

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

# Under what the authors' scripts keep the weights
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
        help='architecture (default: told from the keys, which several networks of '
        'MRLA and of KCLA on CIFAR have the same)',
    )
    parser.add_argument(
        '--head-dim',
        type=int,
        metavar='D',
        help='channels of a head, where no tensor tells them and the published code '
        'has several (default: the only one)',
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
