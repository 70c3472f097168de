"""What the pruning hook and the import of mmela cost.

Steps: the same training step without the LayerAttentionPruningHook, with it
outside of its measuring windows, and inside of one. They take turns. Closing a
window, once in several epochs, is not part of a step.

Measuring: what the hook computes in a step of a window, on the scores of such
a step, by itself. That tells it from noise which is larger than it is.

Start-up: a fresh Python process imports the toolbox alone, or the toolbox and
mmela. They take turns too.

Examples:
  python -m tools.benchmark.hook_overhead --net cifar56 --batch 128
  python -m tools.benchmark.hook_overhead --net r50 --device cuda \\
      --out hook.json
"""

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from time import perf_counter
from types import SimpleNamespace
from typing import Callable, Dict, List, Sequence

import torch

from mmela.hooks import LayerAttentionPruningHook, NetworkKLMeter
from mmela.structure import attention_stages

from .common import (
    base_parser,
    describe,
    format_table,
    machine,
    noisy,
    positive,
    progress,
    ratio,
    run_rounds,
    set_up,
    settings,
    summary,
    synchronize,
    warn_if_busy,
    write_results,
)
from .networks import Contestant, add_network_options, complete_options

WINDOW = (1, 1)
TOOLBOXES = ('mmdet', 'mmpretrain')


def parse_args(argv=None) -> argparse.Namespace:
    parser = base_parser(__doc__, rounds=50)
    add_network_options(parser)
    parser.set_defaults(net='cifar56', variants=['mrla-base'])
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
        help='processes of each kind (default: %(default)s)',
    )
    return parser.parse_args(argv)


def make_steps(contestant: Contestant, work_dir: str) -> Dict[str, Callable[[], None]]:
    """Training steps without and with the hook.

    Args:
        contestant (Contestant): Network with a prunable layer attention.
        work_dir (str): Directory for what the hook writes.

    Returns:
        dict[str, callable]: ``no hook``, ``outside`` and ``inside``.
    """
    # What the hook reads of a runner; the measuring is the hook's own.
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

    def with_hook(epoch: int) -> Callable[[], None]:
        hook = LayerAttentionPruningHook(windows=[WINDOW])
        hook.before_train(runner)
        runner.epoch = epoch
        hook.before_train_epoch(runner)
        runner.epoch = 0

        def step() -> None:
            hook.before_train_iter(runner, 0)
            contestant.step()
            hook.after_train_iter(runner, 0)

        return step

    return {
        'no hook': contestant.step,
        'outside': with_hook(WINDOW[1]),
        'inside': with_hook(WINDOW[0] - 1),
    }


def measuring_times(
    contestant: Contestant, device: torch.device, repeats: int
) -> List[float]:
    """Time what is computed for the divergences in one step.

    Args:
        contestant (Contestant): Network with a prunable layer attention.
        device (torch.device): Where it is.
        repeats (int): How often.

    Returns:
        list[float]: Seconds per step.
    """
    stages = attention_stages(contestant.model)
    scores = {}
    for name, stage in stages.items():
        stage.observer = partial(scores.__setitem__, name)
    contestant.step()
    meters = NetworkKLMeter(stages, 'mean_kl', 1e-8).meters
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = perf_counter()
        for name, meter in meters.items():
            meter(scores[name])
        synchronize(device)
        times.append(perf_counter() - start)
    for stage in stages.values():
        stage.observer = None
    return times[1:]


def import_times(imports: Sequence[str], repeats: int) -> Dict[str, List[float]]:
    """Time imports in fresh processes.

    Args:
        imports (Sequence[str]): Import statements.
        repeats (int): Processes for each.

    Returns:
        dict[str, list[float]]: Seconds, the start of Python not included.

    Raises:
        SystemExit: If an import fails.
    """
    times: Dict[str, List[float]] = {statement: [] for statement in imports}
    code = (
        'from time import perf_counter; start = perf_counter(); {}; '
        'print(perf_counter() - start)'
    )
    turns = [list(imports)[:: -1 if index % 2 else 1] for index in range(repeats)]
    for statement in progress([s for turn in turns for s in turn]):
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code.format(statement)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(
                f'error: {statement}: {done.stderr.strip().splitlines()[-1]}'
            )
        times[statement].append(float(done.stdout.split()[-1]))
    return times


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    """Measure steps and imports.

    Args:
        args (argparse.Namespace): Options.
        device (torch.device): Where to measure.

    Returns:
        dict: ``settings``, ``machine``, ``steps`` and ``imports``: by name
        what :func:`common.summary` returns and ``ratio`` to the first;
        ``measuring``: the summary.

    Raises:
        SystemExit: If the options do not fit.
    """
    about = machine(device)
    warn_if_busy(about)
    complete_options(args, device)
    if len(args.variants) != 1 or args.variants[0] in ('resnet', 'mrla-light', 'kcla'):
        raise SystemExit(
            f'error: --variants={args.variants}: one variant '
            'with a prunable attention is needed, e.g. mrla-base'
        )
    contestant = Contestant(args.variants[0], args, device, weights={})
    contestant.prepare(args.warmup)
    with tempfile.TemporaryDirectory() as work_dir:
        steps = make_steps(contestant, work_dir)
        for step in steps.values():
            step()
        times = run_rounds(steps, args.rounds, device, args.steps, args.limit)
    measuring = measuring_times(contestant, device, args.rounds)
    groups = dict(steps=times)
    if args.toolbox:
        alone = f'import {args.toolbox}'
        groups['imports'] = import_times(
            [alone, f'{alone}; import mmela'], args.imports
        )
    results = dict(tool='hook_overhead', settings=settings(args), machine=about)
    for group, times in groups.items():
        first = next(iter(times.values()))
        results[group] = {
            name: dict(summary(seconds), ratio=ratio(seconds, first))
            for name, seconds in times.items()
        }
    results['measuring'] = summary(measuring)
    return results


def table(results: dict) -> str:
    """Results as text.

    Args:
        results (dict): Of :func:`measure`.

    Returns:
        str: Markdown.
    """
    s = results['settings']
    lines = [
        f'training step: {s["net"]} {s["variants"][0]}, {s["size"][0]}x'
        f'{s["size"][1]}, batch {s["batch"]}, {s["dtype"]}',
        describe(results['machine']),
        '',
    ]
    for group in ('steps', 'imports'):
        if group not in results:
            continue
        first = next(iter(results[group].values()))
        rows = []
        for name, result in results[group].items():
            added = statistics.median(
                a - b for a, b in zip(result['times'], first['times'])
            )
            rows.append(
                [
                    name,
                    f'{result["median"] * 1e3:.2f}',
                    f'{result["iqr"] * 1e3:.2f}',
                    f'{added * 1e3:+.2f}',
                    f'{result["ratio"] - 1:+.2%}',
                ]
            )
        lines += [format_table([group, 'ms', 'IQR', 'added ms', 'added'], rows), '']
        if noisy(results[group]):
            lines.append(
                'noisy (IQR above 10 % of the median): '
                f'{", ".join(noisy(results[group]))}'
            )
    median = results['measuring']['median']
    step = results['steps']['no hook']['median']
    lines.append(
        f'measuring by itself: {median * 1e3:.2f} ms in a step of a '
        f'window, {median / step:.2%} of it'
    )
    if results['machine']['busy']:
        lines.append('The machine was busy: do not quote these times.')
    return '\n'.join(lines).rstrip()


def main(argv=None) -> None:
    args = parse_args(argv)
    device = set_up(args)
    results = measure(args, device)
    print(table(results))
    write_results(args.out, results)


if __name__ == '__main__':
    main()
