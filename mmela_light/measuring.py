"""Options of the tools that measure."""

import argparse
from typing import Dict, List, Optional

# Layer attention of each variant
VARIANTS: Dict[str, Optional[dict]] = {
    'plain': None,
    'published': dict(type='PublishedMRLABase'),
    'mla': dict(type='MLA'),
    'mrla-base': dict(type='MRLABase'),
    'mrla-light': dict(type='MRLALight'),
    'ela': dict(type='MRLABase'),
    'kcla': dict(type='KCLA'),
    'attn-res': dict(type='AttnRes', total='sum'),
    'attn-res-image': dict(type='AttnRes', total='sum', per='image'),
}
WITH_BACKEND = ('mla', 'mrla-base', 'ela', 'attn-res', 'attn-res-image')
CLOCKS = ('wall', 'cpu')
# Names of torch's types
DTYPES = dict(fp32='float32', bf16='bfloat16', fp16='float16')
WHOLE = 'whole'


def add_network_options(parser: argparse.ArgumentParser, variants: List[str]) -> None:
    """Add the options that say what to measure.

    Args:
        parser (argparse.ArgumentParser): Parser of a tool.
        variants (list[str]): Default variants.
    """
    parser.add_argument(
        '--net',
        default='r50',
        metavar='NAME|CONFIG',
        help='rN and cifarN, the ResNets of N layers for ImageNet and CIFAR, or the '
        'config of a classifier or detector, one that is shipped as mmdet::... '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        default=variants,
        metavar='NAME',
        help=f'what to compare: {", ".join(VARIANTS)}. Ratios are to the first. '
        f'{", ".join(WITH_BACKEND)} take a backend as in ela:compile; '
        f':{WHOLE} has torch.compile take the whole backbone '
        f'(default: {" ".join(variants)})',
    )
    parser.add_argument(
        '--size',
        type=parse_size,
        metavar='N|HxW',
        help='image size in pixels (default: 224, CIFAR 32, that of a config)',
    )
    parser.add_argument(
        '--batch',
        type=int,
        metavar='N',
        help='images (default: 8, CIFAR 128, detectors 2)',
    )
    parser.add_argument(
        '--prune',
        nargs='+',
        metavar='BLOCK',
        help='blocks that ela has no attention in, such as layer3.1, or pruning.json '
        'of a run (default: the second, fourth, ... of each stage)',
    )
    parser.add_argument(
        '--head-dim',
        type=int,
        metavar='N',
        help="channels of a head (default: the config's, CIFAR 16, else 32)",
    )
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        default='fp32',
        help='what autocast computes in; fp32 is without (default: fp32)',
    )
    parser.add_argument(
        '--channels-last',
        action='store_true',
        help='weights and images in channels_last memory format',
    )


def parse_size(text: str) -> tuple:
    """Height and width from ``N`` or ``HxW``."""
    parts = text.lower().split('x')
    if len(parts) > 2 or not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no size; give N or HxW in pixels'
        )
    return int(parts[0]), int(parts[-1])


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options of all measurements.

    Args:
        parser (argparse.ArgumentParser): Parser of a tool.
        rounds (int): Default number of rounds.
    """
    parser.add_argument(
        '--device',
        help='cpu, cuda, cuda:1, ... (default: a GPU of CUDA, if any)',
    )
    parser.add_argument(
        '--rounds',
        type=positive,
        default=rounds,
        metavar='N',
        help='measurements of each variant (default: %(default)s)',
    )
    parser.add_argument(
        '--steps',
        type=positive,
        metavar='N',
        help='steps that one measurement is the mean of (default: 1 on a CPU; '
        '5 on a GPU, where steps in a row overlap with their launches)',
    )
    parser.add_argument(
        '--threads', type=positive, metavar='N', help='CPU threads (default: as torch)'
    )
    parser.add_argument(
        '--clock',
        choices=CLOCKS,
        default='wall',
        help='what times are of: the clock on the wall, or the work of this process '
        'on all CPUs, for a machine that is busy with other work (default: wall)',
    )
    parser.add_argument('--out', metavar='FILE', help='JSON file for the results')


def positive(text: str) -> int:
    """An integer >= 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not positive')
    return value
