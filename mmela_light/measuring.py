"""Options of the benchmark tools."""

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
# Names of torch's data types
DTYPES = dict(fp32='float32', bf16='bfloat16', fp16='float16')
WHOLE = 'whole'


def add_network_options(parser: argparse.ArgumentParser, variants: List[str]) -> None:
    """Add the options that choose the networks to measure.

    Args:
        parser (argparse.ArgumentParser): Parser of a tool.
        variants (list[str]): Default variants.
    """
    parser.add_argument(
        '--net',
        default='r50',
        metavar='NAME|CONFIG',
        help='rN or cifarN for a ResNet with N layers for ImageNet or CIFAR, or the '
        'config of a classifier or detector, such as mmdet::... for a config of '
        'MMDetection (default: %(default)s)',
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        default=variants,
        metavar='NAME',
        help=f'variants to compare: {", ".join(VARIANTS)}. Ratios are relative to the '
        f'first one. {", ".join(WITH_BACKEND)} can have a backend, such as '
        f'ela:compile; :{WHOLE} compiles the whole backbone with torch.compile '
        f'(default: {" ".join(variants)})',
    )
    parser.add_argument(
        '--size',
        type=parse_size,
        metavar='N|HxW',
        help='image size in pixels (default: 224; CIFAR: 32; config: its own)',
    )
    parser.add_argument(
        '--batch',
        type=int,
        metavar='N',
        help='batch size (default: 8; CIFAR: 128; detectors: 2)',
    )
    parser.add_argument(
        '--prune',
        nargs='+',
        metavar='BLOCK',
        help='blocks without attention in ela, such as layer3.1, or the pruning.json '
        'of a run (default: every second block of each stage)',
    )
    parser.add_argument(
        '--head-dim',
        type=int,
        metavar='N',
        help='channels per head (default: 32; CIFAR: 16; config: its own)',
    )
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        default='fp32',
        help='data type of autocast; fp32 means no autocast (default: fp32)',
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
            f'{text!r} is not a size; give N or HxW in pixels'
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
        help='cpu, cuda, cuda:1, ... (default: cuda if available, else cpu)',
    )
    parser.add_argument(
        '--rounds',
        type=positive,
        default=rounds,
        metavar='N',
        help='number of measurements of each variant (default: %(default)s)',
    )
    parser.add_argument(
        '--steps',
        type=positive,
        metavar='N',
        help='number of steps to average in one measurement (default: 1 on a CPU; 5 on '
        'a GPU, where a step overlaps with the launches of the next)',
    )
    parser.add_argument(
        '--threads',
        type=positive,
        metavar='N',
        help="number of CPU threads (default: torch's)",
    )
    parser.add_argument(
        '--clock',
        choices=CLOCKS,
        default='wall',
        help='wall: elapsed time; cpu: time that this process uses on all CPUs, for a '
        'machine that is busy with other work (default: wall)',
    )
    parser.add_argument('--out', metavar='FILE', help='JSON file for the results')


def positive(text: str) -> int:
    """An integer >= 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not positive')
    return value
