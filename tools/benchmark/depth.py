"""How the layer attention of one stage grows with its depth.

Time and peak memory of forward and backward pass through the attention branch
alone: the blocks of the stage pass their input on unchanged, and that input
and the gradient of the output are not counted as memory. A CIFAR network of
20, 56 and 110 layers has 2, 6 and 12 blocks per stage.

A cost of a T + b T^2 for T blocks is fitted (a, b >= 0, least squares of the
relative errors). Growth is called quadratic where b T^2 makes up more than a
quarter at the deepest stage.

Examples:
  python -m tools.benchmark.depth
  python -m tools.benchmark.depth --channels 512 --size 28 --batch 32 \\
      --head-dim 32 --device cuda --out depth.json
"""

import argparse
import sys
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from mmela.layers import SequentialAttentionStage
from mmela.registry import LAYER_ATTENTIONS

from .common import (
    autocast,
    base_parser,
    describe,
    format_table,
    machine,
    noisy,
    positive,
    run_rounds,
    set_up,
    settings,
    summary,
    warn_if_busy,
    write_results,
)
from .memory import peak_rise, storage_bytes, tensors_in
from .networks import VARIANTS

# Share of the quadratic term from which growth is called quadratic
QUADRATIC = 0.25


def parse_args(argv=None) -> argparse.Namespace:
    parser = base_parser(__doc__, rounds=20)
    kinds = [name for name in VARIANTS if name not in ('resnet', 'ela')]
    parser.add_argument(
        '--variants',
        nargs='+',
        default=kinds,
        choices=kinds,
        help='what to compare (default: all)',
    )
    parser.add_argument(
        '--blocks',
        nargs='+',
        type=positive,
        default=[2, 6, 12],
        help='blocks per stage (default: 2 6 12)',
    )
    parser.add_argument('--channels', type=positive, default=128, help='(default: 128)')
    parser.add_argument('--head-dim', type=positive, default=16, help='(default: 16)')
    parser.add_argument(
        '--size',
        type=positive,
        default=16,
        help='height and width of the features (default: 16)',
    )
    parser.add_argument(
        '--batch', type=positive, default=32, help='images (default: 32)'
    )
    return parser.parse_args(argv)


def build_stage(
    variant: str, blocks: int, args: argparse.Namespace
) -> SequentialAttentionStage:
    """A stage whose blocks are nothing but their layer attention.

    Args:
        variant (str): Name of the layer attention.
        blocks (int): Number of blocks.
        args (argparse.Namespace): Options.

    Returns:
        AttentionStage: The stage.
    """
    torch.manual_seed(0)
    stage = SequentialAttentionStage(*(nn.Identity() for _ in range(blocks)))
    for index in range(blocks):
        attention = LAYER_ATTENTIONS.build(
            dict(
                type=VARIANTS[variant],
                channels=args.channels,
                head_dim=args.head_dim,
                drop_path=0.0,
            )
        )
        stage.attach(index, attention)
    return stage


def make_step(
    stage: nn.Module, x: torch.Tensor, grad: torch.Tensor, dtype: str
) -> Callable[[], None]:
    """Forward and backward pass of a stage, gradients to its input too."""

    def step() -> None:
        x.grad = None
        stage.zero_grad(set_to_none=True)
        with autocast(x.device, dtype):
            out = stage(x)
        out.backward(grad.to(out.dtype))

    return step


def fit_growth(blocks: Sequence[int], costs: Sequence[float]) -> Dict[str, object]:
    """Fit ``a T + b T^2``, both terms >= 0, to costs of ``T`` blocks.

    Args:
        blocks (Sequence[int]): Numbers of blocks, two at least.
        costs (Sequence[float]): Their costs, > 0.

    Returns:
        dict: ``linear`` a, ``quadratic`` b, ``share`` of the quadratic term
        at the deepest stage, and ``growth``, ``'linear'`` or ``'quadratic'``.
    """
    t = np.array(blocks, dtype=float)
    y = np.array(costs, dtype=float)
    terms = np.stack([t, t**2], axis=1) / y[:, None]
    a, b = nnls(terms, np.ones_like(y))[0]
    deepest = t.max()
    share = b * deepest / (a + b * deepest)
    return dict(
        linear=float(a),
        quadratic=float(b),
        share=float(share),
        growth='quadratic' if share > QUADRATIC else 'linear',
    )


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    """Measure all variants at all depths, in turns.

    Args:
        args (argparse.Namespace): Options.
        device (torch.device): Where to measure.

    Returns:
        dict: ``settings``, ``machine``, ``stages`` (by variant
        a list with ``blocks``, ``peak_bytes`` and what
        :func:`common.summary` returns) and ``fits`` (by variant those of
        ``time`` and ``memory``).

    Raises:
        SystemExit: If the stages cannot be built.
    """
    about = machine(device)
    warn_if_busy(about)
    blocks = sorted(set(args.blocks))
    if len(blocks) < 2:
        raise SystemExit(
            f'error: --blocks={args.blocks} is one depth; growth needs two at least'
        )
    form = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = (args.batch, args.channels, args.size, args.size)
    x = torch.randn(shape, device=device).contiguous(memory_format=form)
    grad = torch.randn(shape, device=device).contiguous(memory_format=form)
    x.requires_grad_()

    steps: Dict[Tuple[str, int], Callable[[], None]] = {}
    stages: Dict[str, List[dict]] = {name: [] for name in args.variants}
    for name in args.variants:
        for count in blocks:
            print(f'{name}, {count} blocks: warm up, measure memory', file=sys.stderr)
            try:
                stage = build_stage(name, count, args)
            except ValueError as error:
                raise SystemExit(f'error: {name}: {error}') from None
            stage.to(device=device, memory_format=form)
            step = make_step(stage, x, grad, args.dtype)
            for _ in range(args.warmup):
                step()
            x.grad = None
            stage.zero_grad(set_to_none=True)
            # Without the input and the gradient of the output, which do not
            # grow with the depth
            resident = storage_bytes(
                tensors_in([list(stage.parameters()), list(stage.buffers())])
            )
            stages[name].append(
                dict(blocks=count, peak_bytes=resident + peak_rise(step, device))
            )
            steps[name, count] = step
    times = run_rounds(steps, args.rounds, device, args.steps, args.limit)
    fits = {}
    for name, results in stages.items():
        for result in results:
            result.update(summary(times[name, result['blocks']]))
        fits[name] = {
            key: fit_growth(blocks, [result[cost] for result in results])
            for key, cost in (('time', 'median'), ('memory', 'peak_bytes'))
        }
    return dict(
        tool='depth',
        settings=settings(args),
        machine=about,
        stages=stages,
        fits=fits,
    )


def table(results: dict) -> str:
    """Results as text.

    Args:
        results (dict): Of :func:`measure`.

    Returns:
        str: Markdown.
    """
    s = results['settings']
    lines = [
        f'layer attention of one stage, forward and backward: {s["channels"]} '
        f'channels, {s["size"]}x{s["size"]}, batch {s["batch"]}, '
        f'{s["dtype"]}',
        describe(results['machine']),
        '',
    ]
    rows, spread = [], {}
    for name, stage in results['stages'].items():
        first = stage[0]
        for result in stage:
            count = result['blocks']
            per_block, base = [
                (r['median'] / r['blocks'], r['peak_bytes'] / r['blocks'])
                for r in (result, first)
            ]
            rows.append(
                [
                    f'{name}, {count} blocks',
                    f'{per_block[0] * 1e3:.3f}',
                    f'{result["iqr"] / count * 1e3:.3f}',
                    f'{per_block[0] / base[0]:.2f}',
                    f'{per_block[1] / 2**20:.2f}',
                    f'{per_block[1] / base[1]:.2f}',
                ]
            )
            spread[f'{name} ({count})'] = result
    count = min(s['blocks'])
    lines.append(
        format_table(
            [
                'per block',
                'ms',
                'IQR',
                f'x {count} blocks',
                'peak MiB',
                f'x {count} blocks',
            ],
            rows,
        )
    )
    fits = [
        [
            name,
            fit['time']['growth'],
            f'{fit["time"]["share"]:.0%}',
            fit['memory']['growth'],
            f'{fit["memory"]["share"]:.0%}',
        ]
        for name, fit in results['fits'].items()
    ]
    lines += [
        '',
        format_table(
            [
                f'at {max(s["blocks"])} blocks',
                'time',
                'quadratic share',
                'memory',
                'quadratic share',
            ],
            fits,
        ),
    ]
    if noisy(spread):
        lines.append(
            f'noisy (IQR above 10 % of the median): {", ".join(noisy(spread))}'
        )
    if results['machine']['busy']:
        lines.append('The machine was busy: do not quote these times.')
    return '\n'.join(lines)


def main(argv=None) -> None:
    args = parse_args(argv)
    device = set_up(args)
    results = measure(args, device)
    print(table(results))
    write_results(args.out, results)


if __name__ == '__main__':
    main()
