"""What the benchmark tools share: options, rounds, statistics, results."""

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
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# Spread over median from which a result is called noisy
NOISY = 0.1
# Seconds between two lines on the progress where there is no terminal
SILENCE = 30

Item = TypeVar('Item')


def base_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Parser with the options that every tool has.

    Args:
        description (str): The tool's docstring.
        rounds (int): Default number of rounds.

    Returns:
        argparse.ArgumentParser: The parser.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cpu, cuda, cuda:1, ... (default: %(default)s)',
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
    parser.add_argument(
        '--rounds',
        type=positive,
        default=rounds,
        help='measurements of each variant (default: %(default)s)',
    )
    parser.add_argument(
        '--limit',
        type=float,
        metavar='SECONDS',
        help='begin no round later than this after the first (default: none)',
    )
    parser.add_argument(
        '--steps',
        type=positive,
        help='steps that one measurement is the mean of (default: 1 on a CPU; '
        '5 on a GPU, where steps in a row overlap with their launches)',
    )
    parser.add_argument(
        '--warmup',
        type=positive,
        default=2,
        help='unmeasured steps of each variant (default: %(default)s)',
    )
    parser.add_argument(
        '--threads', type=positive, help='CPU threads (default: as torch)'
    )
    parser.add_argument(
        '--bandwidth-mib',
        type=positive,
        help='size of the copy that measures the memory bandwidth (default: '
        '256 on a CPU, 2048 on a GPU)',
    )
    parser.add_argument('--out', help='JSON file for the results')
    return parser


def positive(text: str) -> int:
    """An integer >= 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not positive')
    return value


def set_up(args: argparse.Namespace) -> torch.device:
    """Check the shared options and apply them to torch.

    Fills in ``steps`` and ``bandwidth_mib`` where they are not given.

    Args:
        args (argparse.Namespace): Parsed options.

    Returns:
        torch.device: The device to measure on.

    Raises:
        SystemExit: If there is no such device, or the results cannot be
            written.
    """
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f'error: --device={args.device}: {reason}') from None
    if device.type not in ('cpu', 'cuda'):
        raise SystemExit(f'error: --device={args.device} is neither cpu nor cuda')
    if args.out and Path(args.out).is_dir():
        raise SystemExit(f'error: --out={args.out} is a directory')
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = device.type == 'cuda'
    if on_gpu:
        torch.cuda.set_device(device)
    args.steps = args.steps or (5 if on_gpu else 1)
    args.bandwidth_mib = args.bandwidth_mib or (2048 if on_gpu else 256)
    return device


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def autocast(device: torch.device, dtype: str):
    """Context in which to run a forward pass; nothing for fp32."""
    if dtype == 'fp32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def progress(items: Sequence[Item]) -> Iterator[Item]:
    """Go through items and say on stderr how far it is.

    On a terminal in one line that overwrites itself; elsewhere, as in a log, in
    a plain line every 30 s.

    Args:
        items (Sequence): What is to do.

    Yields:
        Any: The items.
    """
    terminal = sys.stderr.isatty()
    start = told = time.monotonic()
    try:
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if terminal or now - told >= SILENCE:
                told = now
                left = (now - start) / done * (len(items) - done)
                text = f'{done} of {len(items)}, about {left:.0f} s left'
                begin, end = ('\r', '\x1b[K') if terminal else ('', '\n')
                print(begin + text, end=end, file=sys.stderr, flush=True)
    finally:
        if terminal:
            print(file=sys.stderr)


def run_rounds(
    actions: Dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    steps: int = 1,
    limit: Optional[float] = None,
    after_round: Callable[[Dict[str, List[float]]], object] = lambda times: None,
) -> Dict[str, List[float]]:
    """Time actions round-robin.

    Each round runs every action, so that a drift of the machine hits all
    alike. The order rotates from round to round, so that none always follows
    the same one.

    Args:
        actions (dict[str, callable]): What to time.
        rounds (int): Number of rounds.
        device (torch.device): Device to wait for.
        steps (int): Calls in a row that one time is the mean of. Defaults to
            1.
        limit (float, optional): Seconds after which no further round begins.
            Defaults to None.
        after_round (callable): Is given the times so far. Defaults to nothing.

    Returns:
        dict[str, list[float]]: Seconds per call, one for each round.
    """
    names = list(actions)
    times: Dict[str, List[float]] = {name: [] for name in names}
    shifts = [index % len(names) for index in range(rounds)]
    begin = time.perf_counter()
    turns = [n for s in shifts for n in names[s:] + names[:s]]
    for index, name in enumerate(progress(turns)):
        if index and index % len(names) == 0:
            after_round(times)
            if limit is not None and time.perf_counter() - begin > limit:
                break
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            actions[name]()
        synchronize(device)
        times[name].append((time.perf_counter() - start) / steps)
    return times


def summary(times: Sequence[float]) -> Dict[str, object]:
    """Median and spread of times.

    Args:
        times (Sequence[float]): Seconds.

    Returns:
        dict: ``median`` and ``iqr``, the interquartile range (of one time 0),
        in seconds; ``times``, all of them.
    """
    low, high = times[0], times[0]
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method='inclusive')
    return dict(median=statistics.median(times), iqr=high - low, times=list(times))


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of the time relative to the reference's.

    Both times of a quotient are of one round, so that drift cancels out.

    Args:
        times (Sequence[float]): Times, one for each round.
        reference (Sequence[float]): Those of the reference.

    Returns:
        float: The ratio.
    """
    return statistics.median(a / b for a, b in zip(times, reference))


def machine(device: torch.device) -> Dict[str, object]:
    """Describe what the measurements run on.

    Args:
        device (torch.device): The device.

    Returns:
        dict: ``device``, ``name`` of the GPU or CPU, ``cpu``, ``cores`` this
        process may use, ``threads``, ``load_average`` of the last minute,
        ``busy`` (whether it is above the cores), ``python``, ``torch``,
        ``cuda`` and ``cudnn`` (None on a CPU), ``tf32``.
    """
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, 'sched_getaffinity')
        else os.cpu_count()
    )
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    on_gpu = device.type == 'cuda'
    return dict(
        device=device.type,
        name=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        cpu=_cpu_name(),
        cores=cores,
        threads=torch.get_num_threads(),
        load_average=load,
        busy=load is not None and load > cores,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda if on_gpu else None,
        cudnn=torch.backends.cudnn.version() if on_gpu else None,
        tf32=dict(
            convolution=torch.backends.cudnn.allow_tf32,
            matmul=torch.backends.cuda.matmul.allow_tf32,
        )
        if on_gpu
        else None,
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def warn_if_busy(about: Dict[str, object]) -> None:
    """Say so on stderr where other work distorts the measurements."""
    if about['busy']:
        print(
            f'warning: the machine is busy: load average '
            f'{about["load_average"]:.1f} on {about["cores"]} cores. Times '
            'will be too long and spread; measure again when it is idle.',
            file=sys.stderr,
        )


def describe(about: Dict[str, object]) -> str:
    """One line on a machine, for tables and pictures."""
    text = (
        f'{about["name"]}, {about["cores"]} cores, {about["threads"]} '
        f'threads, torch {about["torch"]}'
    )
    return text + ', BUSY' if about['busy'] else text


def noisy(results: Dict[str, dict]) -> List[str]:
    """Names whose interquartile range is above 10 % of the median."""
    return [
        name
        for name, result in results.items()
        if result.get('median') and result['iqr'] > NOISY * result['median']
    ]


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown: the first column left, others right.

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


def settings(args: argparse.Namespace) -> Dict[str, object]:
    """Options as they go into the results: all but the paths of files."""
    return {
        key: value for key, value in vars(args).items() if key not in ('out', 'mask')
    }


def write_results(out: Optional[str], results: dict, tell: bool = True) -> None:
    """Write results as JSON, if a file is given.

    Args:
        out (str, optional): The file; its folder is made.
        results (dict): Plain values.
        tell (bool): Print the file's name. Defaults to True.
    """
    if out is None:
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + '.new')  # for who reads it meanwhile
    whole.write_text(json.dumps(results, indent=2) + '\n')
    whole.replace(path)
    if tell:
        print(path)


def parse_size(text: str) -> Tuple[int, int]:
    """Height and width from ``N`` or ``HxW``."""
    try:
        parts = [positive(part) for part in text.lower().split('x')]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no size; give N or HxW in pixels'
        )
    return parts[0], parts[-1]
