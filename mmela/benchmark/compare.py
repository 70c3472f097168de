"""Compare the speed and memory of a network with different layer attentions.

It measures time and peak memory of a training step (forward, backward, SGD) and of
inference for the plain network, MLA, MRLA-base, MRLA-light, KCLA, attention residuals
per position and per image, and ELA, which is MRLA-base with pruned attentions.
`published` follows the equations of MRLA-base literally: each block copies all earlier
keys and values. The variants take turns, so that a drift of the machine affects all
equally; a ratio is the median of the ratios within a round.

Examples:
  mmela compare --net r50 --batch 8 --channels-last
  mmela compare --net r50 --variants plain ela ela:compile ela:whole
  mmela compare --net my_config.py --prune work_dirs/my_config/pruning.json
  mmela compare --net mmdet::retinanet/retinanet_r50_fpn_1x_coco.py \\
      --mode inference
"""

import argparse
import sys
from typing import Dict, List, Optional, Sequence

from mmela_light.arguments import tool_parser
from mmela_light.measuring import add_network_options, add_options, positive

MODES = ('training', 'inference')
DEFAULT = ['plain', 'mrla-base', 'ela', 'mrla-light', 'kcla']


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = tool_parser('compare', __doc__)
    add_network_options(parser, DEFAULT)
    parser.add_argument(
        '--mode', choices=MODES, help='measure only this mode (default: both)'
    )
    parser.add_argument(
        '--warmup',
        type=positive,
        default=2,
        metavar='N',
        help='unmeasured steps of each variant (default: %(default)s)',
    )
    add_options(parser, rounds=20)
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> Dict[str, object]:
    """Measure the variants given by the options.

    Args:
        args (argparse.Namespace): Options.

    Returns:
        dict: ``settings``, ``machine``, and for each mode and variant the results of
        :meth:`Contestant.prepare` and :func:`rounds.summary`, or ``error`` if the
        memory of the GPU is too small.

    Raises:
        ValueError: If an option is invalid.
        OSError: If a file cannot be read.
    """
    import torch

    from .networks import Contestant, Network
    from .rounds import machine, run_rounds, set_up, summary, write_results

    device = set_up(args)
    network = Network(args)
    contestants = {v: Contestant(v, network, device) for v in args.variants}
    results: Dict[str, object] = dict(
        tool='compare',
        settings={k: v for k, v in vars(args).items() if k != 'out'},
        machine=machine(device),
    )
    for mode in [args.mode] if args.mode else MODES:
        train = mode == 'training'
        measured: Dict[str, dict] = {}
        for variant, contestant in contestants.items():
            print(
                f'{mode}, {variant}: warming up and measuring memory', file=sys.stderr
            )
            try:
                measured[variant] = contestant.prepare(train, args.warmup)
            except torch.cuda.OutOfMemoryError:
                measured[variant] = dict(error='out of memory')
                torch.cuda.empty_cache()
        steps = {
            v: c.train_step if train else c.infer
            for v, c in contestants.items()
            if 'error' not in measured[v]
        }
        if steps:
            times = run_rounds(steps, args.rounds, device, args.steps, args.clock)
            first = times[next(iter(steps))]
            for variant in steps:
                measured[variant].update(summary(times[variant], first))
        results[mode] = measured
        write_results(args.out, results)
    return results


def table(results: dict, mode: str) -> str:
    """Format the results of one mode.

    Args:
        results (dict): Result of :func:`compare`.
        mode (str): ``'training'`` or ``'inference'``.

    Returns:
        str: A heading and a table in Markdown.
    """
    from .rounds import describe, format_table, noisy

    s, variants = results['settings'], results[mode]
    measured = {v: r for v, r in variants.items() if 'error' not in r}
    first = next(iter(measured), '')
    rows: List[List[str]] = []
    for variant, r in variants.items():
        if 'error' in r:
            rows.append([variant, r['error']])
            continue
        rows.append(
            [
                variant,
                f'{r["active"]} / {r["attentions"]}',
                f'{r["median"] * 1e3:.1f} ± {r["iqr"] * 1e3:.1f}',
                f'{r["ratio"]:.3f} ± {r["ratio_iqr"]:.3f}',
                f'{s["batch"] / r["median"]:.1f}',
                f'{r["peak_bytes"] / 2**20:.0f}',
                f'{r["peak_bytes"] / measured[first]["peak_bytes"]:.2f}',
                f'{r["first_seconds"]:.1f}',
                f'{r["graphs"]}',
            ]
        )
    columns = ['variant', 'active', 'ms', f'x {first}', 'images/s']
    columns += ['peak MiB', f'x {first}', 'first step, s', 'graphs']
    layout = ', channels_last' if s['channels_last'] else ''
    size = 'x'.join(map(str, s['size']))
    lines = [
        f'{mode}: {s["net"]}, {size}, batch {s["batch"]}, {s["dtype"]}{layout}',
        describe(results['machine']),
        '',
        format_table(columns, rows),
        'median over the rounds ± interquartile range'
        + (', CPU time of the process' if s['clock'] == 'cpu' else ''),
        noisy(measured),
    ]
    return '\n'.join(lines)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line, see ``--help``.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to those of the
            process.

    Raises:
        SystemExit: With a one-line error if an argument is invalid.
    """
    args = parse_args(argv)
    from ..command_line import one_line_errors

    with one_line_errors(OSError, ValueError, KeyError, ImportError):
        results = compare(args)
    for mode in MODES:
        if mode in results:
            print(table(results, mode))
