"""Choose the block sizes of the Triton kernels on this GPU.

For each kernel, layout and size of an element, every candidate is compared with
plain torch operations and timed on maps of ResNet-50 and -101 at 224 px and of a
detector at 800x1333. The one whose times are the least, relative to the fastest
at each shape, goes into the file that the kernels read: into --blocks, by default
mmela/ops/triton_blocks.json, beside the entries of other GPUs. Another file is
read where MMELA_TRITON_BLOCKS names it.

The results hold the achieved bandwidth: the bytes that a sum has to move over its
time, for the chosen block and for backend 'autograd', beside that of a copy.

Without a GPU, Triton interprets the kernels where TRITON_INTERPRET=1; what is
chosen then means nothing.

Example:
  python -m tools.benchmark.tune --out tuned.json
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from mmela.ops import layer_weighted_sum

from .common import (
    DTYPES,
    describe,
    format_table,
    machine,
    positive,
    progress,
    set_up,
    settings,
    synchronize,
    write_results,
)
from .traffic import copy_bandwidth

BLOCKS = (1024, 2048, 4096, 8192)
WARPS = (4, 8)
HEAD_DIM = 32
# Batch, channels, height, width, values
SHAPES = (
    (64, 256, 56, 56, 3),  # stage 1 of ResNet-50
    (64, 1024, 14, 14, 6),  # stage 3
    (32, 1024, 14, 14, 23),  # of ResNet-101
    (2, 256, 200, 334, 3),  # stage 1 of a detector
)
SMALL = ((2, 32, 3, 3, 2),)
FORMS = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
KERNELS = ('forward', 'backward')
Candidate = Tuple[int, int]


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--repeats', type=positive, default=20, help='(default: 20)')
    parser.add_argument('--small', action='store_true', help='one small shape')
    parser.add_argument(
        '--blocks',
        help='file of block sizes to write (default: the one that the kernels read)',
    )
    parser.add_argument('--out', help='JSON file for the results')
    parser.set_defaults(threads=None, steps=1, bandwidth_mib=None)
    return parser.parse_args(argv)


class Case:
    """A sum to time.

    Args:
        shape (tuple[int]): See ``SHAPES``.
        dtype (torch.dtype): Data type of the values.
        form (torch.memory_format): Their layout.
        device (torch.device): Where they are.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        form: torch.memory_format,
        device: torch.device,
    ) -> None:
        batch, channels, height, width, self.layers = shape
        torch.manual_seed(0)
        heads = channels // HEAD_DIM
        self.attn = torch.rand(batch, heads, self.layers, device=device).softmax(-1)
        size = (batch, channels, height, width)
        self.grad, *self.values = [
            torch.randn(size, device=device, dtype=dtype).to(memory_format=form)
            for _ in range(self.layers + 1)
        ]
        one = self.grad.numel() * self.grad.element_size()
        t = self.layers
        self.bytes = dict(forward=(t + 1) * one, backward=(2 * t + 1) * one)

    def run(self, kernel: str) -> List[Tensor]:
        """The sum, or its gradients, by the Triton kernels."""
        from mmela.ops import triton_kernels

        if kernel == 'forward':
            return [triton_kernels.forward(self.attn, self.values)]
        grad_attn, grads = triton_kernels.backward(
            self.grad, self.attn, self.values, True, [True] * self.layers
        )
        return [grad_attn, *grads]

    def plain(self, backend: str) -> Dict[str, Callable[[], List[Tensor]]]:
        """The same by another backend; the graph of the backward pass is kept."""
        leaves = [x.detach().requires_grad_() for x in (self.attn, *self.values)]
        out = layer_weighted_sum(leaves[0], leaves[1:], backend)

        def backward() -> List[Tensor]:
            return list(torch.autograd.grad(out, leaves, self.grad, retain_graph=True))

        def forward() -> List[Tensor]:
            return [layer_weighted_sum(leaves[0], leaves[1:], backend).detach()]

        return dict(forward=forward, backward=backward)


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, in rows that are long beside their launch."""
    call()
    times = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def tune(args: argparse.Namespace, device: torch.device) -> dict:
    """Time all candidates.

    Args:
        args (argparse.Namespace): Options.
        device (torch.device): Where to measure.

    Returns:
        dict: ``tool``, ``settings``, ``machine``, ``bandwidth`` of a copy,
        ``gpu``, the name under which the kernels look for ``blocks``, and
        ``times``: by key of the blocks a list with ``shape``, ``least``
        (seconds at the bandwidth of a copy), ``autograd`` and ``candidates``,
        seconds by ``'block x warps'``.
    """
    from mmela.ops import triton_kernels as kernels

    name = kernels.gpu_name(device)
    candidates: List[Candidate] = list(itertools.product(BLOCKS, WARPS))
    shapes, dtypes = SHAPES, ('fp32', 'bf16')
    if args.small:
        shapes, candidates = SMALL, candidates[:2]
    bandwidth = copy_bandwidth(device, args.bandwidth_mib * 2**20)
    results = dict(
        tool='tune',
        settings=settings(args),
        machine=machine(device),
        bandwidth=[bandwidth],
        gpu=name,
        blocks={},
        times={},
    )
    default = dict(kernels.BLOCKS['default'])
    # What is read while a candidate is timed, whatever the file has for this GPU
    kernels.BLOCKS.pop(name, None)
    for dtype, layout in progress(list(itertools.product(dtypes, FORMS))):
        rows: Dict[str, List[dict]] = {}
        for shape in shapes:
            case = Case(shape, DTYPES[dtype], FORMS[layout], device)
            for kernel, plain in case.plain('autograd').items():
                itemsize = case.grad.element_size()
                key = kernels.blocks_key(kernel, FORMS[layout], itemsize)
                row = dict(
                    shape=list(shape),
                    least=case.bytes[kernel] / bandwidth,
                    autograd=seconds(plain, device, args.repeats),
                    candidates={},
                )
                expected = plain()
                for block, warps in candidates:
                    kernels.BLOCKS['default'] = dict(block=block, warps=warps)
                    text = f'{block} x {warps}'
                    try:
                        _check(case.run(kernel), expected)
                        row['candidates'][text] = seconds(
                            lambda kernel=kernel, case=case: case.run(kernel),
                            device,
                            args.repeats,
                        )
                    except Exception as error:  # of a compiler, or a wrong result
                        print(f'{key}, {text}: {error}', file=sys.stderr)
                rows.setdefault(key, []).append(row)
        kernels.BLOCKS['default'] = default
        for key, found in rows.items():
            results['times'][key] = found
            chosen = best(found)
            if chosen is not None:
                results['blocks'][key] = dict(block=chosen[0], warps=chosen[1])
        write_results(args.out, results, tell=False)
    return results


def _check(found: List[Tensor], expected: List[Tensor]) -> None:
    half = found[-1].element_size() == 2
    for result, e in zip(found, expected):
        scale = float(e.abs().max())
        gap = float((result.float() - e.float()).abs().max())
        if not gap <= (2e-2 if half else 1e-4) * max(scale, 1):
            raise ArithmeticError(f'wrong by {gap:.2g} of {scale:.2g}')


def best(rows: Sequence[dict]):
    """The candidate that is nearest to the fastest over all shapes.

    Args:
        rows (Sequence[dict]): Of each shape, with ``candidates``.

    Returns:
        tuple[int, int] | None: Block and warps; None if none works everywhere.
    """
    common = set.intersection(*(set(row['candidates']) for row in rows))
    if not common:
        return None

    def distance(text: str) -> float:
        return sum(
            math.log(row['candidates'][text] / min(row['candidates'].values()))
            for row in rows
        )

    block, warps = min(sorted(common), key=distance).split(' x ')
    return int(block), int(warps)


def table(results: dict) -> str:
    """Results as text.

    Args:
        results (dict): Of :func:`tune`.

    Returns:
        str: Markdown.
    """
    lines = [
        describe(results['machine'])
        + f'; copies at {results["bandwidth"][0] / 1e9:.0f} GB/s',
        '',
    ]
    rows = []
    for key, found in results['times'].items():
        chosen = results['blocks'].get(key)
        text = f'{chosen["block"]} x {chosen["warps"]}' if chosen else 'none'
        for row in found:
            times = row['candidates']
            time_of = times.get(text)
            batch, channels, height, width, layers = row['shape']
            rows.append(
                [
                    key,
                    f'{batch}x{channels}x{height}x{width}, {layers} values',
                    text,
                    f'{row["least"] * 1e3:.3f}',
                    f'{time_of * 1e3:.3f}' if time_of else '',
                    f'{row["least"] / time_of:.0%}' if time_of else '',
                    f'{max(times.values()) / time_of:.2f}' if time_of else '',
                    f'{row["autograd"] * 1e3:.3f}',
                ]
            )
    columns = ['kernel', 'values', 'block x warps', 'least ms', 'ms', 'of a copy']
    lines.append(format_table([*columns, 'x slowest', 'autograd ms'], rows))
    return '\n'.join(lines)


def write_blocks(path: str, results: dict) -> None:
    """Put what was chosen into the file that the kernels read.

    Args:
        path (str): The file; entries of other GPUs stay.
        results (dict): Of :func:`tune`.
    """
    file = Path(path)
    from mmela.ops import triton_kernels

    blocks = dict(default=triton_kernels.BLOCKS['default'])
    if file.is_file():
        blocks = json.loads(file.read_text())
    if results['gpu'] != 'default':
        blocks[results['gpu']] = results['blocks']
    write_results(path, blocks)


def main(argv=None) -> None:
    args = parse_args(argv)
    device = set_up(args)
    try:
        from mmela.ops import triton_kernels
    except ImportError as error:
        raise SystemExit(f'error: {error}') from None
    results = tune(args, device)
    print(table(results))
    write_blocks(args.blocks or str(triton_kernels.BLOCKS_FILE), results)
    write_results(args.out, results)


if __name__ == '__main__':
    main()
