"""Compare variants of a network: what train_step.py and inference.py share."""

import argparse
import sys
from typing import Dict, List, Sequence

import torch

from .common import (
    describe,
    format_table,
    machine,
    noisy,
    ratio,
    run_rounds,
    settings,
    summary,
    warn_if_busy,
    write_results,
)
from .networks import Contestant, complete_options
from .traffic import copy_bandwidth

# What ratios are given to
REFERENCES = ('published', 'resnet')


def compare(args: argparse.Namespace, device: torch.device, train: bool) -> dict:
    """Measure the variants that the options name, in turns.

    Memory is measured first, one variant after the other, with the warm-up;
    then the times, round-robin, after each round of which the results so far are
    written. A variant that a GPU has no memory for is left out.

    Args:
        args (argparse.Namespace): Options.
        device (torch.device): Where to measure.
        train (bool): Training steps; otherwise inference.

    Returns:
        dict: ``tool``, ``settings``, ``machine``, ``bandwidth`` (bytes per
        second, before and after) and ``variants``: by name what
        :meth:`networks.Contestant.prepare` and :func:`common.summary` return,
        ``ratio`` and ``memory_ratio`` to each reference, and
        ``traffic_seconds``, the traffic over the bandwidth; or ``error``.
    """
    about = machine(device)
    warn_if_busy(about)
    complete_options(args, device)
    size = args.bandwidth_mib * 2**20
    bandwidth = [copy_bandwidth(device, size)]
    contestants: Dict[str, Contestant] = {}
    results: Dict[str, dict] = {}
    weights: Dict[str, torch.Tensor] = {}
    batch = None
    for variant in args.variants:  # all first: what cannot be built fails now
        contestants[variant] = Contestant(variant, args, device, weights, batch, train)
        batch = contestants[variant].batch
    del weights
    for variant in args.variants:
        print(f'{variant}: warm up, measure memory', file=sys.stderr)
        try:
            results[variant] = contestants[variant].prepare(args.warmup)
        except torch.cuda.OutOfMemoryError:
            results[variant] = dict(error='out of memory')
        if 'error' in results[variant]:  # now nothing holds its tensors
            del contestants[variant]
            torch.cuda.empty_cache()
    compared = dict(
        tool='train_step' if train else 'inference',
        settings=settings(args),
        machine=about,
        bandwidth=bandwidth,
        variants=results,
    )

    def keep(times: Dict[str, List[float]]) -> None:
        for name in contestants:
            results[name].update(summary(times[name]))
        add_ratios(results, max(bandwidth))
        write_results(args.out, compared, tell=False)

    if contestants:
        times = run_rounds(
            {n: c.step for n, c in contestants.items()},
            args.rounds,
            device,
            args.steps,
            args.limit,
            keep,
        )
        bandwidth.append(copy_bandwidth(device, size))
        keep(times)
    return compared


def add_ratios(results: Dict[str, dict], bandwidth: float) -> None:
    """Add what follows from the measurements of all variants.

    Args:
        results (dict[str, dict]): Results by variant, which this extends.
        bandwidth (float): Bytes per second.
    """
    for result in results.values():
        if 'error' in result:
            continue
        result['traffic_seconds'] = result['traffic'] / bandwidth
        result['ratio'], result['memory_ratio'] = {}, {}
        for name in REFERENCES:
            reference = results.get(name, dict(error='not measured'))
            if 'error' not in reference:
                result['ratio'][name] = ratio(result['times'], reference['times'])
                result['memory_ratio'][name] = (
                    result['peak_bytes'] / reference['peak_bytes']
                )


def title(results: dict) -> str:
    """What was measured on what, in two lines."""
    what = 'training step' if results['tool'] == 'train_step' else 'inference'
    return (
        f'{what}: {setting(results)}\n'
        f'{describe(results["machine"])}; copies at '
        f'{max(results["bandwidth"]) / 1e9:.1f} GB/s'
    )


def table(results: dict) -> str:
    """Results as text: what, where, a table, and remarks.

    Args:
        results (dict): Of :func:`compare`.

    Returns:
        str: Markdown.
    """
    variants: Dict[str, dict] = results['variants']
    train = results['tool'] == 'train_step'
    columns = ['variant', 'active', 'ms', 'IQR']
    columns += [] if train else ['images/s']
    columns += [
        'x published',
        'x resnet',
        'peak MiB',
        'x published',
        'x resnet',
        'sums MB',
        'least ms',
        'extra ms',
    ]
    plain = variants.get('resnet', {}).get('median')
    rows = []
    for name, result in variants.items():
        if 'error' in result:
            rows.append([name, result['error']])
            continue
        row = [
            name,
            f'{result["active"]} / {result["attentions"]}',
            f'{result["median"] * 1e3:.2f}',
            f'{result["iqr"] * 1e3:.2f}',
        ]
        if not train:
            batch = results['settings']['batch']
            row.append(f'{batch / result["median"]:.1f}')
        row += _ratios(result['ratio'])
        row.append(f'{result["peak_bytes"] / 2**20:.1f}')
        row += _ratios(result['memory_ratio'])
        row.append(f'{result["traffic"] / 1e6:.1f}')
        row.append(f'{result["traffic_seconds"] * 1e3:.2f}')
        row.append('' if plain is None else f'{(result["median"] - plain) * 1e3:.2f}')
        rows.append(row)
    remarks = [
        '',
        'ms: median of the rounds; IQR: interquartile range; ratios of '
        'times: median of the ratios',
        'within a round. sums MB: what one pass over the values of the weighted sums',
        'would read and write, least ms: that over the bandwidth of a copy; extra ms: ',
        'measured above resnet.',
    ]
    spread = noisy(variants)
    if spread:
        remarks.append(f'noisy (IQR above 10 % of the median): {", ".join(spread)}')
    if results['machine']['busy']:
        remarks.append('The machine was busy: do not quote these times.')
    return '\n'.join([title(results), '', format_table(columns, rows), *remarks])


def summary_table(all_results: Sequence[dict]) -> str:
    """Results of several networks and settings in one table.

    Args:
        all_results (Sequence[dict]): Each of :func:`compare`, of one tool.

    Returns:
        str: Markdown.
    """
    train = all_results[0]['tool'] == 'train_step'
    columns = ['network', 'variant', 'ms' if train else 'images/s']
    columns += ['x published', 'x resnet', 'peak MiB', 'x published', 'x resnet']
    rows = []
    for results in all_results:
        network = setting(results)
        for name, result in results['variants'].items():
            row = [network, name]
            network = ''  # said once
            if 'median' not in result:
                rows.append([*row, result.get('error', '')])
                continue
            median = result['median']
            row.append(
                f'{median * 1e3:.1f} ± {result["iqr"] * 1e3:.1f}'
                if train
                else f'{results["settings"]["batch"] / median:.0f}'
            )
            row += [x and f'{float(x):.2f}' for x in _ratios(result['ratio'])]
            row.append(f'{result["peak_bytes"] / 2**20:.0f}')
            row += [x and f'{float(x):.2f}' for x in _ratios(result['memory_ratio'])]
            rows.append(row)
    lines = [describe(all_results[0]['machine']), '', format_table(columns, rows)]
    return '\n'.join(lines)


def setting(results: dict) -> str:
    """Network, size, batch, data type, layout and compiler in a few words."""
    s = results['settings']
    options = [s['dtype']]
    options += ['channels_last'] if s['channels_last'] else []
    options += ['compiled'] if s['compile'] else []
    return (
        f'{s["net"]}, {s["size"][0]}x{s["size"][1]}, batch {s["batch"]}, '
        f'{", ".join(options)}'
    )


def _ratios(ratios: Dict[str, float]) -> List[str]:
    return [f'{ratios[name]:.3f}' if name in ratios else '' for name in REFERENCES]
