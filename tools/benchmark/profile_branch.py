"""Profile the attention branch of MRLA-base or ELA, part by part.

Each part of the plain formula (pool, query and key, value, sum, norm, relu,
add) runs by itself for all active attentions of the network, on random maps of
their shapes: forward, then backward. No two blocks share a map, so caches hold
as little as they do in a network. Beside each time stands the least one: the
bytes that the part has to read and write once, over the bandwidth of a copy in
the same run. Last come all parts in a row, and the branch as the network
computes it. --compile compiles each of these by itself.

Examples:
  python -m tools.benchmark.profile_branch --channels-last --threads 2
  python -m tools.benchmark.profile_branch --net r101 --dtype bf16 --compile
"""

import contextlib
import ctypes
import math
import time
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmela.layers import LayerAttention, MRLABase
from mmela.layers.stages import AttentionStage
from mmela.ops import layer_weighted_sum
from mmela.structure import attention_stages

from .common import (
    DTYPES,
    autocast,
    base_parser,
    describe,
    format_table,
    machine,
    noisy,
    progress,
    set_up,
    settings,
    summary,
    synchronize,
    warn_if_busy,
    write_results,
)
from .networks import Contestant, add_network_options, complete_options
from .traffic import copy_bandwidth

# Rows after those of the parts
PLAIN, BRANCH = 'all parts', 'as computed'


class Block(NamedTuple):
    """An active attention and what it works on.

    Attributes:
        stage (AttentionStage): Its stage.
        attention (LayerAttention): The attention.
        tokens (int): Number of blocks ``t`` that it sees, with its own.
        like (Tensor): Output of its block, (B, C, H, W).
    """

    stage: AttentionStage
    attention: LayerAttention
    tokens: int
    like: Tensor

    def map(self) -> Tensor:
        """A random map in dtype and memory format of the real one."""
        return torch.randn_like(self.like).requires_grad_()

    def small(self, *shape: int) -> Tensor:
        """A random tensor of another shape, (B, *shape), in single precision."""
        device = self.like.device
        return torch.randn(len(self.like), *shape, device=device).requires_grad_()


class Part(NamedTuple):
    """A part of the branch.

    Attributes:
        run (callable): Computes it from the attention and the inputs.
        inputs (callable): Makes the inputs for a :class:`Block`.
        forward (callable): Maps that it reads and writes forward, of ``t``.
        backward (callable): The same backward.
    """

    run: Callable[..., Tensor]
    inputs: Callable[[Block], Sequence[Tensor]]
    forward: Callable[[int], int]
    backward: Callable[[int], int]


def weigh(attention: LayerAttention, pooled: Tensor, *keys: Tensor) -> Tensor:
    """Weights of the layers by query and key, (B, G, t)."""
    query = attention.heads(attention.query(pooled)).unsqueeze(2)
    stack = torch.stack([*keys, attention.heads(attention.key(pooled))], dim=2)
    return ((query * stack).sum(-1) / math.sqrt(query.shape[-1])).softmax(-1)


# Of MRLA, eq. 6 and 9
PARTS: Dict[str, Part] = {
    # Backward, one number per channel is added to the gradient of the map
    'pool': Part(
        lambda a, x: x.mean((2, 3)), lambda b: [b.map()], lambda t: 1, lambda t: 2
    ),
    'query, key': Part(
        weigh,
        lambda b: [
            b.small(1, b.attention.channels),
            *(
                b.small(b.attention.num_heads, b.attention.head_dim)
                for _ in range(b.tokens - 1)
            ),
        ],
        lambda t: 0,
        lambda t: 0,
    ),
    'value': Part(
        lambda a, x: a.value(x), lambda b: [b.map()], lambda t: 2, lambda t: 3
    ),
    'sum': Part(
        lambda a, weights, *values: layer_weighted_sum(weights, values, 'reference'),
        lambda b: [
            b.small(b.attention.num_heads, b.tokens),
            *(b.map() for _ in range(b.tokens)),
        ],
        lambda t: t + 1,
        lambda t: 2 * t + 1,
    ),
    # Once for the statistics, once for the result
    'norm': Part(lambda a, x: a.norm(x), lambda b: [b.map()], lambda t: 3, lambda t: 5),
    'relu': Part(lambda a, x: F.relu(x), lambda b: [b.map()], lambda t: 2, lambda t: 3),
    'add': Part(
        lambda a, x, y: x + y,
        lambda b: [b.map(), b.map()],
        lambda t: 3,
        lambda t: 0,
    ),
}


def find_blocks(contestant: Contestant) -> List[Block]:
    """The active attentions of a network, in the order of its forward pass.

    Args:
        contestant (Contestant): The network.

    Returns:
        list[Block]: The attentions.

    Raises:
        SystemExit: If it has none of MRLA-base.
    """
    blocks: List[Block] = []
    handles = []
    for stage in attention_stages(contestant.model).values():
        active = [a for a in stage.attentions if a.active]
        for tokens, attention in enumerate(active, 1):

            def note(module, args, stage=stage, tokens=tokens):
                like = torch.empty_like(args[0])
                blocks.append(Block(stage, module, tokens, like))

            handles.append(attention.register_forward_pre_hook(note))
    contestant.infer()
    for handle in handles:
        handle.remove()
    if not blocks or not all(isinstance(b.attention, MRLABase) for b in blocks):
        raise SystemExit(
            'error: --variant has no attention with the parts of MRLA-base'
        )
    return blocks


def run_part(part: Part, blocks: Sequence[Block]) -> Callable[..., List[Tensor]]:
    """A function of the inputs of all blocks that computes a part for each."""
    return lambda inputs: [part.run(b.attention, *i) for b, i in zip(blocks, inputs)]


def run_plain(blocks: Sequence[Block]) -> Callable[..., List[Tensor]]:
    """A function of the maps of all blocks that runs all parts in a row."""

    def run(inputs: Sequence[Sequence[Tensor]]) -> List[Tensor]:
        keys: List[Tensor] = []
        values: List[Tensor] = []
        outs = []
        for block, (x,) in zip(blocks, inputs):
            attention = block.attention
            if block.tokens == 1:
                keys, values = [], []
            pooled = PARTS['pool'].run(attention, x).unsqueeze(1)
            weights = weigh(attention, pooled, *keys)
            keys.append(attention.heads(attention.key(pooled)))
            values.append(attention.value(x))
            out = PARTS['sum'].run(attention, weights, *values)
            outs.append(x + F.relu(attention.norm(out)))
        return outs

    return run


def run_branch(blocks: Sequence[Block]) -> Callable[..., List[Tensor]]:
    """A function of the maps of all blocks that does what the stages do."""

    def run(inputs: Sequence[Sequence[Tensor]]) -> List[Tensor]:
        outs = []
        for block, (x,) in zip(blocks, inputs):
            if block.tokens == 1:
                memory = block.attention.Memory()
            outs.append(block.stage.attend(block.attention, x, memory))
        return outs

    return run


def keep_memory() -> None:
    """Have glibc keep what is freed, so that parts pay for no page twice.

    In a network the maps of one block take the pages of another; by itself, each
    part would wait for the kernel to map and clear its own.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**31 - 1)


def profile(args, device: torch.device) -> dict:
    """Time the parts of the branch.

    Args:
        args (argparse.Namespace): Options.
        device (torch.device): Where to measure.

    Returns:
        dict: ``tool``, ``settings``, ``machine``, ``bandwidth`` (bytes per
        second) and ``parts``: by name ``forward`` and ``backward``, each what
        :func:`common.summary` returns and ``traffic``, the bytes.
    """
    keep_memory()
    about = machine(device)
    warn_if_busy(about)
    args.variants = [args.variant]
    complete_options(args, device)
    bandwidth = copy_bandwidth(device, args.bandwidth_mib * 2**20)
    contestant = Contestant(args.variant, args, device, {})
    blocks = find_blocks(contestant)
    blocks = [b._replace(like=b.like.to(DTYPES[args.dtype])) for b in blocks]
    for block in blocks:
        block.attention.train(not args.inference)

    runs = {name: (run_part(part, blocks), part.inputs) for name, part in PARTS.items()}
    runs[PLAIN] = run_plain(blocks), PARTS['pool'].inputs
    runs[BRANCH] = run_branch(blocks), PARTS['pool'].inputs
    if args.compile:
        runs = {
            name: (torch.compile(run, dynamic=False), inputs)
            for name, (run, inputs) in runs.items()
        }
    parameters = [
        p for b in blocks for p in b.attention.parameters() if p.requires_grad
    ]
    gradients = [torch.randn_like(b.like) for b in blocks]
    times: Dict[str, Tuple[List[float], List[float]]] = {n: ([], []) for n in runs}
    names = list(runs)
    shifts = [r % len(names) for r in range(args.warmup + args.rounds)]
    for name in progress([n for s in shifts for n in names[s:] + names[:s]]):
        run, make = runs[name]
        inputs = [make(block) for block in blocks]
        synchronize(device)
        start = time.perf_counter()
        with torch.set_grad_enabled(not args.inference), autocast(device, args.dtype):
            outs = run(inputs)
        synchronize(device)
        middle = time.perf_counter()
        if not args.inference:
            wanted = [x for group in inputs for x in group] + parameters
            given = [
                g.to(out.dtype) if g.shape == out.shape else torch.ones_like(out)
                for g, out in zip(gradients, outs)
            ]
            torch.autograd.grad(outs, wanted, given, allow_unused=True)
        synchronize(device)
        times[name][0].append(middle - start)
        times[name][1].append(time.perf_counter() - middle)
        del inputs, outs

    sizes = [b.like.numel() * b.like.element_size() for b in blocks]
    parts = {}
    for name, (forward, backward) in times.items():
        counted = PARTS.values() if name in (PLAIN, BRANCH) else [PARTS[name]]
        parts[name] = {
            way: dict(
                summary(seconds[args.warmup :]),
                traffic=sum(
                    size * getattr(part, way)(block.tokens)
                    for block, size in zip(blocks, sizes)
                    for part in counted
                ),
            )
            for way, seconds in (('forward', forward), ('backward', backward))
        }
    return dict(
        tool='profile_branch',
        settings=settings(args),
        machine=about,
        bandwidth=bandwidth,
        parts=parts,
    )


def table(results: dict) -> str:
    """Results of :func:`profile` as text with a table in Markdown."""
    s, parts = results['settings'], results['parts']
    ways = ['forward'] if s['inference'] else ['forward', 'backward']
    columns = ['part']
    for way in ways:
        columns += [f'{way}, ms', 'IQR', 'MB', 'least ms']
    rows = []
    for name, part in parts.items():
        row = [name]
        for way in ways:
            result = part[way]
            least = result['traffic'] / results['bandwidth'] * 1e3
            row += [
                f'{result["median"] * 1e3:.1f}',
                f'{result["iqr"] * 1e3:.1f}',
                f'{result["traffic"] / 1e6:.0f}',
                f'{least:.1f}',
            ]
        rows.append(row)
    text = [
        f'branch of {s["variant"]}, {s["net"]}, {s["size"][0]}x{s["size"][1]}, batch '
        f'{s["batch"]}, {s["dtype"]}{", channels_last" if s["channels_last"] else ""}'
        f'{", compiled" if s["compile"] else ""}',
        f'{describe(results["machine"])}; copies at '
        f'{results["bandwidth"] / 1e9:.1f} GB/s',
        '',
        format_table(columns, rows),
    ]
    spread = [n for n in parts if noisy({n: parts[n]['forward']})]
    if spread:
        text += ['', f'noisy (IQR above 10 % of the median): {", ".join(spread)}']
    return '\n'.join(text)


def parse_args(argv=None):
    parser = base_parser(__doc__, rounds=10)
    add_network_options(parser)
    parser.add_argument(
        '--variant',
        choices=('mrla-base', 'ela'),
        default='mrla-base',
        help='which branch (default: mrla-base)',
    )
    parser.add_argument(
        '--inference', action='store_true', help='evaluation mode, no gradients'
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    device = set_up(args)
    results = profile(args, device)
    print(table(results))
    write_results(args.out, results)


if __name__ == '__main__':
    main()
