"""Measure the cost of the pruning hook and of importing mmela.

Steps: the same training step without the LayerAttentionPruningHook, with the hook
outside of its measuring windows, and inside a window, in turns. Closing a window, once
in several epochs, is not part of a step.

Measuring: the part of a step inside a window in which the hook observes the scores. It
is timed separately because noise in the step time is larger.

Start-up: a fresh Python process imports only the toolbox, or the toolbox and mmela, in
turns.

Examples:
  mmela hook-overhead --net cifar56 --batch 16
  mmela hook-overhead --net r50 --device cuda --out hook.json
"""

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence

from mmela_light.arguments import tool_parser
from mmela_light.measuring import add_network_options, add_options, positive

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .networks import Contestant

WINDOW = (1, 1)
TOOLBOXES = ('mmdet', 'mmpretrain')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = tool_parser('hook-overhead', __doc__)
    add_network_options(parser, ['mrla-base'])
    parser.set_defaults(net='cifar56')
    parser.add_argument(
        '--toolbox',
        choices=TOOLBOXES,
        default=next((t for t in TOOLBOXES if find_spec(t)), None),
        help='toolbox to import (default: %(default)s)',
    )
    parser.add_argument(
        '--imports',
        type=positive,
        default=7,
        metavar='N',
        help='number of processes of each kind (default: %(default)s)',
    )
    add_options(parser, rounds=50)
    return parser.parse_args(argv)


def with_hook(
    contestant: 'Contestant',
    work_dir: str,
    epoch: int,
    watch: Callable[[], object] = lambda: None,
) -> Callable[[], None]:
    """Build a training step with the hook.

    Args:
        contestant (Contestant): Network with a prunable layer attention.
        work_dir (str): Folder for the files of the hook.
        epoch (int): Epoch, from 0; inside or outside of the window.
        watch (callable): Called when the hook is ready to measure. Defaults to a
            function that does nothing.

    Returns:
        callable: The step.
    """
    from ..hooks import LayerAttentionPruningHook

    # Only the parts of a runner that the hook reads; the hook itself is real
    runner = SimpleNamespace(
        model=contestant.model,
        train_loop=None,
        max_epochs=WINDOW[1] + 1,
        epoch=0,
        iter=0,
        hooks=[],
        work_dir=work_dir,
        logger=logging.getLogger('hook_overhead'),
        visualizer=SimpleNamespace(add_scalars=lambda *args, **kwargs: None),
        message_hub=SimpleNamespace(log_scalars={}),
        optim_wrapper=SimpleNamespace(optimizer=contestant.optimizer),
    )
    hook = LayerAttentionPruningHook(windows=[WINDOW])
    hook.before_train(runner)
    runner.epoch = epoch
    hook.before_train_epoch(runner)
    runner.epoch = 0

    def step() -> None:
        hook.before_train_iter(runner, 0)
        watch()
        contestant.train_step()
        hook.after_train_iter(runner, 0)

    return step


def time_observers(
    model: 'nn.Module',
    device: 'torch.device',
    seconds: List[float],
    clock: Callable[[], float],
) -> None:
    """Time the observers of the scores, until the hook removes them.

    Args:
        model (nn.Module): A network in a window.
        device (torch.device): Its device.
        seconds (list[float]): The seconds of each call are added here.
        clock (callable): Returns the time in seconds.
    """

    from ..structure import attention_stages
    from .rounds import synchronize

    def timed(observer: Callable, scores: List['torch.Tensor']) -> None:
        synchronize(device)
        start = clock()
        observer(scores)
        synchronize(device)
        seconds.append(clock() - start)

    for stage in attention_stages(model).values():
        if stage.observer is not None:
            stage.observer = partial(timed, stage.observer)


def import_times(imports: Sequence[str], repeats: int) -> Dict[str, List[float]]:
    """Time imports in fresh processes.

    Args:
        imports (Sequence[str]): Import statements.
        repeats (int): Number of processes for each.

    Returns:
        dict[str, list[float]]: Seconds, without the start of Python.

    Raises:
        ValueError: If an import fails.
    """
    times: Dict[str, List[float]] = {statement: [] for statement in imports}
    code = (
        'from time import perf_counter; start = perf_counter(); {}; '
        'print(perf_counter() - start)'
    )
    for index in range(repeats):
        for statement in list(imports)[:: -1 if index % 2 else 1]:
            done = subprocess.run(
                [sys.executable, '-W', 'ignore', '-c', code.format(statement)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1]
                raise ValueError(f'{statement}: {reason}')
            times[statement].append(float(done.stdout.split()[-1]))
    return times


def measure(args: argparse.Namespace) -> dict:
    """Measure steps and imports.

    Args:
        args (argparse.Namespace): Options.

    Returns:
        dict: ``settings``, ``machine``, ``steps`` and ``imports`` with the result of
        :func:`rounds.summary` by name, and ``measuring``, seconds per step.

    Raises:
        ValueError: If an option is invalid.
        OSError: If a file cannot be read.
    """
    from ..structure import attention_stages
    from .networks import Contestant, Network
    from .rounds import clock_of, machine, run_rounds, set_up, summary, write_results

    device = set_up(args)
    network = Network(args)
    if len(args.variants) != 1:
        raise ValueError(
            f'--variants={" ".join(args.variants)} has {len(args.variants)} variants; '
            'give exactly one'
        )
    contestant = Contestant(args.variants[0], network, device)
    stages = attention_stages(contestant.model).values()
    if not any(a.prunable for stage in stages for a in stage.attentions):
        raise ValueError(
            f'--variants={args.variants[0]} has no prunable attention; use mrla-base'
        )
    results: Dict[str, dict] = dict(
        settings={k: v for k, v in vars(args).items() if k != 'out'},
        machine=machine(device),
    )
    contestant.prepare(True, 1)
    inside, outside = WINDOW[0] - 1, WINDOW[1]
    seconds: List[float] = []
    with tempfile.TemporaryDirectory() as work_dir:
        steps = {
            'no hook': contestant.train_step,
            'outside': with_hook(contestant, work_dir, outside),
            'inside': with_hook(contestant, work_dir, inside),
        }
        steps['inside']()
        groups = dict(
            steps=run_rounds(steps, args.rounds, device, args.steps, args.clock)
        )
        now = clock_of(args.clock)
        watch = partial(time_observers, contestant.model, device, seconds, now)
        step = with_hook(contestant, work_dir, inside, watch)
        for _ in range(args.rounds):
            step()
    results['measuring'] = sum(seconds) / args.rounds
    if args.toolbox:
        alone = f'import {args.toolbox}'
        both = [alone, f'{alone}; import mmela']
        groups['imports'] = import_times(both, args.imports)
    for group, times in groups.items():
        first = next(iter(times.values()))
        results[group] = {n: summary(t, first) for n, t in times.items()}
    write_results(args.out, results)
    return results


def table(results: dict) -> str:
    """Format the results.

    Args:
        results (dict): Result of :func:`measure`.

    Returns:
        str: Markdown.
    """
    from .rounds import describe, format_table, noisy

    s = results['settings']
    size = 'x'.join(map(str, s['size']))
    lines = [
        f'training step: {s["net"]} {s["variants"][0]}, {size}, batch {s["batch"]}, '
        f'{s["dtype"]}',
        describe(results['machine']),
        '',
    ]
    for group in ('steps', 'imports'):
        if group not in results:
            continue
        first = next(iter(results[group].values()))
        rows = []
        for name, r in results[group].items():
            added = statistics.median(a - b for a, b in zip(r['times'], first['times']))
            rows.append(
                [
                    name,
                    f'{r["median"] * 1e3:.2f} ± {r["iqr"] * 1e3:.2f}',
                    f'{added * 1e3:+.2f}',
                    f'{r["ratio"] - 1:+.2%}',
                ]
            )
        lines.append(format_table([group, 'ms', 'added ms', 'added'], rows))
        lines += [noisy(results[group]), '']
    share = results['measuring'] / results['steps']['no hook']['median']
    lines.append(
        f'measuring alone: {results["measuring"] * 1e3:.2f} ms per step inside a '
        f'window, {share:.2%} of the step'
    )
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
        print(table(measure(args)))
