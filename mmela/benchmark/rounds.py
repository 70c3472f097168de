"""Time several actions in turns, and describe the machine."""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import torch
from mmengine.utils import ProgressBar
from rich import box
from rich.console import Console
from rich.table import Table

from ..files import write_text

# Spread divided by median above which a result counts as noisy
NOISY = 0.1


def set_up(args: argparse.Namespace) -> torch.device:
    """Check the options of all measurements and apply them to torch.

    Args:
        args (argparse.Namespace): Parsed options, see
            :func:`mmela_light.measuring.add_options`. Missing ``device`` and ``steps``
            are filled in.

    Returns:
        torch.device: The device to measure on.

    Raises:
        ValueError: If the device does not exist or does not have the requested clock,
            or if ``out`` is a folder.
    """
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'--device={args.device}: {reason}') from None
    if args.clock == 'cpu' and device.type != 'cpu':
        raise ValueError(
            f'--clock=cpu does not measure the work of --device={args.device}; use '
            '--clock=wall'
        )
    if args.out and Path(args.out).is_dir():
        raise ValueError(f'--out={args.out} is a folder; give a file')
    if args.threads:
        torch.set_num_threads(args.threads)
    args.steps = args.steps or (1 if device.type == 'cpu' else 5)
    return device


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def clock_of(name: str) -> Callable[[], float]:
    """What tells the time, ``'wall'`` or ``'cpu'``, in seconds."""
    return time.process_time if name == 'cpu' else time.perf_counter


def run_rounds(
    actions: Dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    steps: int = 1,
    clock: str = 'wall',
) -> Dict[str, List[float]]:
    """Time actions in turns.

    Each round runs every action, so that a drift of the machine affects all equally.
    The order rotates from round to round, so that no action always follows the same
    one.

    Args:
        actions (dict[str, callable]): The actions.
        rounds (int): Number of rounds.
        device (torch.device): Device to wait for.
        steps (int): Number of consecutive calls to average for one time. Defaults to
            1.
        clock (str): ``'wall'`` for elapsed time, or ``'cpu'`` for the time that the
            process uses on all CPUs. Defaults to ``'wall'``.

    Returns:
        dict[str, list[float]]: Seconds per call, one for each round.
    """
    now = clock_of(clock)
    names = list(actions)
    times: Dict[str, List[float]] = {name: [] for name in names}
    bar = ProgressBar(rounds * len(names), file=sys.stderr)
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            start = now()
            for _ in range(steps):
                actions[name]()
            synchronize(device)
            times[name].append((now() - start) / steps)
            bar.update()
    print(file=sys.stderr)
    return times


def summary(times: Sequence[float], reference: Sequence[float]) -> Dict[str, object]:
    """Summarize times by median and spread.

    Args:
        times (Sequence[float]): Seconds, one for each round.
        reference (Sequence[float]): Seconds of the reference, one for each round.

    Returns:
        dict: ``median`` and ``iqr``, the interquartile range (0 for a single time), in
        seconds; ``ratio``, the median of the ratios to the reference within a round,
        which cancels drift, and ``ratio_iqr``; ``times``.
    """
    ratios = [a / b for a, b in zip(times, reference)]
    return dict(
        median=statistics.median(times),
        iqr=_spread(times),
        ratio=statistics.median(ratios),
        ratio_iqr=_spread(ratios),
        times=list(times),
    )


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return high - low


def machine(device: torch.device) -> Dict[str, object]:
    """Describe the machine of a measurement.

    Args:
        device (torch.device): The device.

    Returns:
        dict: ``device``; ``name`` of the GPU or CPU; ``cores`` that this process may
        use; ``threads``; ``load_average`` of the last minute; ``busy``, whether it
        exceeds the cores; ``python``; ``torch``.
    """
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, 'sched_getaffinity')
        else os.cpu_count() or 1
    )
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    on_gpu = device.type == 'cuda'
    return dict(
        device=device.type,
        name=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        cores=cores,
        threads=torch.get_num_threads(),
        load_average=load,
        busy=load is not None and load > cores,
        python=platform.python_version(),
        torch=torch.__version__,
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(about: Dict[str, object]) -> str:
    """Describe a machine in one line."""
    text = (
        f'{about["name"]}, {about["cores"]} cores, {about["threads"]} '
        f'threads, torch {about["torch"]}'
    )
    return text + ', BUSY: do not quote these times' if about['busy'] else text


def noisy(results: Dict[str, dict]) -> str:
    """List results with an IQR above 10 % of the median; empty if there are none."""
    names = [n for n, r in results.items() if r['iqr'] > NOISY * r['median']]
    return f'noisy (IQR above 10 % of the median): {", ".join(names)}' if names else ''


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown, with all columns but the first aligned right.

    Args:
        columns (Sequence[str]): Headings.
        rows (Sequence[Sequence[str]]): Cells.

    Returns:
        str: The table.
    """
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify='right' if index else 'left', no_wrap=True)
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=400).print(table)
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return '\n'.join(line for line in lines if line)


def write_results(out: Optional[str], results: dict) -> None:
    """Write results as JSON, if a file is given.

    Args:
        out (str, optional): The file. Its folder is created if needed.
        results (dict): Plain values.
    """
    if out is None:
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=2) + '\n')
    print(path)
