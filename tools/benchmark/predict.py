"""Predict step times on a device from the operators of a network.

A step of the real network runs on tensors without data, while each operator that
reaches torch's dispatcher is counted: its floating point operations, the bytes of
the tensors that it reads and writes, and its launch. Then, for a device,

- a kernel takes the longest of operations over rate, bytes over bandwidth, and
  LATENCY; a step the longer of the sum of all kernels and of what the host needs to
  launch them;
- compiled, a row of elementwise operators and reductions that follow each other is
  one kernel (and one more per reduction), which reads each tensor from before the
  row and writes each that is used after it; the host launches graphs of them.

Of a detector, feature extraction, RPN head and RoI heads on the usual number of
proposals are counted, not the choice of boxes, which is the same for all variants.

With --measured, the JSON file of gpu.py, train_step.py or inference.py, measured
ratios stand beside predicted ones.

Examples:
  python -m tools.benchmark.predict --nets r50 r101 r152 faster-rcnn mask-rcnn
  python -m tools.benchmark.predict --nets r50 --gpus 8 --dtype bf16
  python -m tools.benchmark.predict --nets r50 --dtype fp32 --batch 8 \\
      --bandwidth 20 --tflops 0.15 --measured r50.json
"""

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mmela.layers import mrla_base

from .common import autocast, format_table, positive, write_results
from .networks import (
    DETECTORS,
    IMAGENET,
    NETS,
    WITH_BACKEND,
    add_network_options,
    build_network,
    complete_options,
    prune_network,
)

LATENCY = 2e-6  # of a kernel, however small
HOST = 6e-6  # of an operator, autograd included
HOST_COMPILED = 2e-6  # of a kernel
BUCKET = 25 * 2**20  # bytes, of DDP
LINK = 300e9  # bytes per second of each GPU in an all-reduce over NVLink
# Reads its input once more than its arguments say: statistics come first
TWO_PASSES = ('batch_norm', 'batch_norm_backward', 'layer_norm', 'softmax')
# What a compiler calls, rather than fuses with its neighbours
CALLED = ('convolution', 'mm', 'bmm', 'addmm', 'max_pool', 'pool2d_with', 'embedding')
Key = Tuple[int, int]


@dataclass(frozen=True)
class Operator:
    """What one operator does.

    Args:
        name (str): As in torch, e.g. ``convolution``.
        flops (int): Floating point operations.
        reads (tuple): Tensors, each as its number and bytes.
        writes (tuple): Likewise.
    """

    name: str
    flops: int
    reads: Tuple[Key, ...]
    writes: Tuple[Key, ...]

    @property
    def passes(self) -> int:
        return (
            2
            if self.name.lstrip('_').replace('native_', '').startswith(TWO_PASSES)
            else 1
        )

    @property
    def called(self) -> bool:
        return self.name.startswith(CALLED) or 'pool' in self.name

    @property
    def bytes(self) -> int:
        reads = sum(size for _, size in self.reads)
        return reads * self.passes + sum(size for _, size in self.writes)


class Recorder(TorchDispatchMode):
    """Records the operators that run within it in ``operators``."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: List[Operator] = []
        # Weak, as autograd copies a gradient that another refers to; and kept, or
        # an address would be given twice
        self.kept: List[StorageWeakRef] = []
        self.numbers: Dict[int, int] = {}

    def number(self, tensor: Tensor) -> Key:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage.cdata not in self.numbers:
            self.numbers[storage.cdata] = len(self.numbers)
            self.kept.append(storage)
        return self.numbers[storage.cdata], tensor.numel() * tensor.element_size()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func.namespace != 'aten':
            return out
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if not outputs or name.startswith(('empty', 'detach', 'alias', 'new_empty')):
            return out
        self.add(name, flops_of(func, args, kwargs, out), inputs, outputs)
        return out

    def add(
        self, name: str, flops: int, reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        """Record an operator."""
        keys = [tuple({self.number(x) for x in tensors}) for tensors in (reads, writes)]
        self.operators.append(Operator(name, flops, *keys))


def flops_of(func, args: tuple, kwargs: dict, out) -> int:
    """Floating point operations; torch's counter ignores groups backward."""
    if func is torch.ops.aten.convolution.default:
        return 2 * out.numel() * args[1][0].numel()
    if func is torch.ops.aten.convolution_backward.default:
        grad, _, weight = args[:3]
        return 2 * grad.numel() * weight[0].numel() * sum(args[-1][:2])
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


class OnePass(torch.autograd.Function):
    """The Triton kernels, as far as counting goes: :class:`Recorder` sees one each."""

    recorder: Recorder

    @staticmethod
    def forward(ctx, attn: Tensor, *values: Tensor) -> Tensor:
        ctx.save_for_backward(attn, *values)
        out = torch.empty_like(values[0])
        OnePass.recorder.add('sum', 0, [attn, *values], [out])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        inputs = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in inputs)
        OnePass.recorder.add('sum', 0, [grad, *inputs], gradients)
        return gradients


@dataclass(frozen=True)
class Device:
    """What a device attains.

    Args:
        bandwidth (float): Bytes per second.
        rate (float): Floating point operations per second in convolutions.
    """

    bandwidth: float
    rate: float

    def seconds(self, flops: float, size: float) -> float:
        return max(flops / self.rate, size / self.bandwidth, LATENCY)

    def eager(self, operators: Sequence[Operator]) -> float:
        """Seconds of a step, operator by operator."""
        kernels = sum(self.seconds(o.flops, o.bytes) for o in operators)
        return max(kernels, HOST * len(operators))

    def compiled(self, operators: Sequence[Operator]) -> float:
        """Seconds of a step, elementwise operators in rows fused."""
        kernels = list(fused(operators))
        return max(
            sum(self.seconds(flops, size) for flops, size in kernels),
            HOST_COMPILED * len(kernels),
        )


def all_reduce(step: float, size: int, gpus: int) -> float:
    """Seconds of a step with the exchange of gradients, which it hides partly.

    Two thirds of a step are its backward pass, beside which all buckets but the
    last are exchanged.

    Args:
        step (float): Seconds of a step of one GPU.
        size (int): Bytes of the gradients.
        gpus (int): Number of GPUs.

    Returns:
        float: Seconds.
    """
    if gpus == 1:
        return step
    whole = 2 * (gpus - 1) / gpus * size / LINK
    last = whole * min(1.0, BUCKET / size)
    return step + max(whole - last - step * 2 / 3, 0) + last


def fused(operators: Sequence[Operator]) -> Iterator[Tuple[int, int]]:
    """Operations and bytes of the kernels that a compiler makes.

    Args:
        operators (Sequence[Operator]): In the order of the step.

    Yields:
        tuple[int, int]: Those of a kernel.
    """
    last_use = {key[0]: i for i, o in enumerate(operators) for key in o.reads}
    row: List[int] = []

    def kernels_of(row: List[int]) -> Iterator[Tuple[int, int]]:
        made: Set[int] = set()
        reads: Dict[int, int] = {}
        for index in row:
            operator = operators[index]
            if operator.passes > 1:  # the statistics, before what they are used in
                yield 0, sum(size for _, size in operator.reads)
            for number, size in operator.reads:
                if number not in made:
                    reads[number] = max(size, reads.get(number, 0))
            made.update(number for number, _ in operator.writes)
        writes = {
            number: size
            for index in row
            for number, size in operators[index].writes
            if last_use.get(number, len(operators)) > row[-1] or number in reads
        }
        yield 0, sum(reads.values()) + sum(writes.values())

    for index, operator in enumerate(operators):
        if not operator.called:
            row.append(index)
            continue
        if row:
            yield from kernels_of(row)
            row = []
        yield operator.flops, operator.bytes
    if row:
        yield from kernels_of(row)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within, a GPU's operators are counted, which the tensors here are not on.

    Sum and norm are not one function, as on a CPU, and backend='triton' counts what
    its kernels would do.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(mrla_base, 'can_norm_sum', lambda *_: False))
        with contextlib.suppress(ImportError):  # no Triton: no variant of it either
            from mmela.ops import triton_kernels

            stack.enter_context(
                patch.multiple(
                    triton_kernels, works=lambda *args: True, LayerWeightedSum=OnePass
                )
            )
        yield


def features_of(model: nn.Module, args: argparse.Namespace, x: Tensor) -> Tensor:
    """What stands for the loss: all outputs that a training step computes."""
    if args.net not in DETECTORS:
        return model.head.fc(model.extract_feat(x)[-1]).sum()
    maps = model.extract_feat(x)
    outputs = [*model.rpn_head(maps)]
    proposals = args.batch * 512
    outputs += model.roi_head.bbox_head(x.new_empty(proposals, 256, 7, 7))
    if model.roi_head.with_mask:
        # A quarter of the proposals has an object
        outputs.append(
            model.roi_head.mask_head(x.new_empty(proposals // 4, 256, 14, 14))
        )
    return sum(t.float().sum() for t in tree_leaves(outputs))


def record(variant: str, args: argparse.Namespace, compiled: bool) -> dict:
    """Count a training step of a variant.

    Args:
        variant (str): Name of the variant.
        args (argparse.Namespace): Options, complete.
        compiled (bool): As a compiler sees it, with the plain sum.

    Returns:
        dict: ``operators``, and ``gradients``, their bytes.
    """
    if compiled:
        variant = variant.replace(':triton', '')
        args = argparse.Namespace(**dict(vars(args), backend='reference'))
    model = build_network(variant, args)
    prune_network(variant, model, args)
    form = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(memory_format=form).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in model.modules():
            for name, param in module._parameters.items():
                if param is not None:
                    module._parameters[name] = nn.Parameter(
                        fake.from_tensor(param.detach()), param.requires_grad
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None and name != 'state':  # of attentions: is read
                    module._buffers[name] = fake.from_tensor(buffer)
        x = torch.empty(args.batch, 3, *args.size).contiguous(memory_format=form)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True)
        for recorder in (Recorder(), Recorder()):  # the first makes its state
            optimizer.zero_grad(set_to_none=True)
            OnePass.recorder = recorder
            with recorder, as_on_a_gpu():
                with autocast(torch.device('cpu'), args.dtype):
                    loss = features_of(model, args, x)
                loss.backward()
                optimizer.step()
    gradients = sum(p.numel() * p.element_size() for p in params)
    return dict(operators=recorder.operators, gradients=gradients)


def predict(args: argparse.Namespace, device: Device) -> List[dict]:
    """Predict all variants of the networks.

    Args:
        args (argparse.Namespace): Options.
        device (Device): What they run on.

    Returns:
        list[dict]: ``net``, ``variant``, ``dtype``, ``batch``, ``operators`` and
        ``kernels`` (numbers of launches, eager and compiled), ``gigabytes``
        likewise, ``tflop``, ``gradients``, their bytes, and ``eager`` and
        ``compiled``, seconds of a step on one device.
    """
    rows = []
    for net in args.nets:
        options = argparse.Namespace(**vars(args))
        options.net = net
        if net in IMAGENET and options.batch is None:
            options.batch = 64  # as gpu.py
        complete_options(options, torch.device('cuda'))
        for variant in args.variants:
            eager = record(variant, options, compiled=False)
            compiled = eager
            if variant.split(':')[0] in WITH_BACKEND:
                compiled = record(variant, options, compiled=True)
            kernels = list(fused(compiled['operators']))
            rows.append(
                dict(
                    net=net,
                    variant=variant,
                    dtype=args.dtype,
                    batch=options.batch,
                    operators=len(eager['operators']),
                    kernels=len(kernels),
                    gigabytes=[
                        sum(o.bytes for o in eager['operators']) / 1e9,
                        sum(size for _, size in kernels) / 1e9,
                    ],
                    tflop=sum(o.flops for o in eager['operators']) / 1e12,
                    gradients=eager['gradients'],
                    eager=device.eager(eager['operators']),
                    compiled=device.compiled(compiled['operators']),
                )
            )
            print(f'{net}, {variant}: counted', file=sys.stderr, flush=True)
            write_results(args.out, dict(tool='predict', rows=rows), tell=False)
    return rows


def read_measured(path: Optional[str]) -> Dict[Tuple[str, str, str, bool, int], dict]:
    """Measured variants by network, name, data type, compiled, and batch."""
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text())
        parts = [p.get('results') or {} for p in content.get('parts', {}).values()]
    except (AttributeError, OSError, ValueError) as error:
        raise SystemExit(f'error: {path}: {error!r}') from None
    found = {}
    for results in parts or [content]:
        if results.get('tool') == 'train_step':
            s = results['settings']
            for name, result in results['variants'].items():
                if 'ratio' in result:
                    key = (s['net'], name, s['dtype'], s['compile'], s['batch'])
                    found.setdefault(key, result)
    return found


def table(rows: Sequence[dict], measured: Dict[tuple, dict], gpus: int) -> str:
    """Predictions as text.

    Args:
        rows (Sequence[dict]): Of :func:`predict`.
        measured (dict[tuple, dict]): Of :func:`read_measured`.
        gpus (int): Number of GPUs that exchange gradients.

    Returns:
        str: Markdown.
    """
    columns = ['network', 'variant', 'operators', 'GB', 'ms']
    columns += ['x resnet', 'measured', 'x published', 'measured']
    cells = []
    for kind in ('eager', 'compiled'):
        for row in rows:
            same = {
                r['variant']: all_reduce(r[kind], r['gradients'], gpus)
                for r in rows
                if r['net'] == row['net']
            }
            step = same[row['variant']]
            key = (row['net'], row['variant'], row['dtype'], kind == 'compiled')
            ratios = {}
            if gpus == 1:
                ratios = measured.get((*key, row['batch']), {}).get('ratio', {})
            line = [
                f'{row["net"]}, {kind}',
                row['variant'],
                str(row['operators' if kind == 'eager' else 'kernels']),
                f'{row["gigabytes"][kind == "compiled"]:.1f}',
                f'{step * 1e3:.1f}',
            ]
            for name in ('resnet', 'published'):
                value = ratios.get(name)
                line.append(f'{step / same[name]:.2f}' if name in same else '')
                line.append('' if value is None else f'{value:.2f}')
            cells.append(line)
    return format_table(columns, cells)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--nets', nargs='+', choices=NETS, default=['r50'])
    parser.add_argument('--dtype', choices=('fp32', 'bf16'), default='bf16')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument(
        '--gpus', nargs='+', type=positive, default=[1], help='(default: 1)'
    )
    parser.add_argument(
        '--bandwidth',
        type=float,
        default=4300.0,
        help='GB/s, as a copy attains (default: %(default)s, an H200)',
    )
    parser.add_argument(
        '--tflops',
        type=float,
        help='that convolutions attain (default: 400 in bf16, 200 in fp32 by TF32, '
        'about half of what matrix products do on an H200)',
    )
    parser.add_argument('--measured', metavar='FILE', help='results to set beside')
    parser.add_argument('--out', help='JSON file for the results')
    add_network_options(parser)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    rate = args.tflops or (400.0 if args.dtype == 'bf16' else 200.0)
    measured = read_measured(args.measured)  # before what takes minutes
    rows = predict(args, Device(args.bandwidth * 1e9, rate * 1e12))
    for gpus in args.gpus:
        print(f'\n{gpus} GPU{"s" * (gpus > 1)}:\n\n{table(rows, measured, gpus)}')
    write_results(args.out, dict(tool='predict', rows=rows))


if __name__ == '__main__':
    main()
