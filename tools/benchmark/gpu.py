"""All that is to be measured on a GPU, most valuable first, until time is up.

Checks (tests/test_gpu.py and the cases of the Triton kernels), the block sizes of
the Triton kernels, training steps and inference of classifiers and detectors, eager
and compiled, and what the pruning hook costs. Each part is a process of its own with
a limit of its own, so that none can take the others along. After each part, and
while one runs, OUT has all results so far:

  tables.md           tables for docs/performance.md
  results.json        settings, machine and raw times of all parts
  triton_blocks.json  the chosen block sizes, for mmela/ops
  log.txt             what the parts have printed

Networks are compiled while the checks run; what is timed comes from the compiler's
cache then. Nothing is downloaded. Without a GPU, or with --reduced, tiny networks run
instead, so that a mistake in here shows before a GPU's time is spent.

Examples:
  bash tools/benchmark/gpu.sh work_dirs/gpu
  python -m tools.benchmark.gpu work_dirs/gpu --parts checks tune r50
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from .common import format_table, write_results

ROOT = Path(__file__).resolve().parents[2]
# Seconds under which no part is begun
LEAST = 10
POLL = 2.0
# What a part's process imports, once for all
PRELOAD = ('tools.benchmark.parts',)

COMPILED = ('resnet', 'published', 'mrla-base', 'ela')
EAGER = (
    *('resnet', 'published', 'mrla-base', 'mrla-base:triton'),
    *('mrla-light', 'ela', 'ela:triton', 'kcla'),
)
FAST = ('--dtype', 'bf16', '--channels-last')
IMAGENET = ('--batch', '64')
TINY = (
    *('--net', 'cifar20', '--size', '16', '--batch', '2', '--rounds', '2'),
    *('--warmup', '1', '--bandwidth-mib', '1'),
)


@dataclass(frozen=True)
class Part:
    """A process with a limit.

    Args:
        name (str): Its name.
        tool (str): A function of ``tools.benchmark.parts``, or a module of
            ``tools.benchmark`` with ``main``.
        arguments (tuple[str]): Its command line.
        variants (tuple[str]): Variants to compare. Defaults to none, for tools
            that take none.
        budget (float): Seconds until it is stopped. Defaults to 45.
        warm (str): Name of the network that it has compiled, one of a part with
            a name such as ``warm NAME VARIANT`` for each variant; those that
            are not done are left out. Defaults to ''.
        reduced (tuple[str], optional): Its command line without a GPU. Defaults
            to None: it is left out there.
    """

    name: str
    tool: str
    arguments: Tuple[str, ...] = ()
    variants: Tuple[str, ...] = ()
    budget: float = 45
    warm: str = ''
    reduced: Optional[Tuple[str, ...]] = None


def warm_parts(net: str, variants: Sequence[str], *arguments: str) -> List[Part]:
    """Parts that fill the compiler's cache, one for each variant."""
    once = ('--rounds', '1', '--warmup', '1', '--bandwidth-mib', '16', '--compile')
    return [
        Part(
            f'warm {net} {variant}',
            'train_step',
            ('--net', net, *FAST, *arguments, *once),
            (variant,),
            budget=150,
        )
        for variant in variants
    ]


def timed(
    name: str,
    net: str,
    *arguments: str,
    tool: str = 'train_step',
    variants: Sequence[str] = EAGER,
    **kwargs,
) -> Part:
    """A part that compares variants, in about 12 s of rounds."""
    reduced = None
    if not kwargs.get('warm'):
        reduced = TINY
        if not net.startswith('r'):  # on a CPU, compiled mmcv knows no bf16
            reduced = (*TINY[6:], '--net', net, '--size', '64x96', '--batch', '1')
        if '--channels-last' in arguments:
            reduced += ('--channels-last',)
    return Part(
        name,
        tool,
        ('--net', net, *arguments, '--rounds', '15', '--limit', '12'),
        tuple(variants),
        reduced=reduced,
        **kwargs,
    )


# Parts of a group run at the same time
GROUPS: List[List[Part]] = [
    [
        Part('checks', 'checks', budget=150, reduced=('-k', 'weighted_sum')),
        *warm_parts('r50', (*COMPILED, 'mrla-light', 'kcla'), *IMAGENET),
        *warm_parts('faster-rcnn', COMPILED),
        *warm_parts('r101', COMPILED, *IMAGENET),
    ],
    [Part('tune', 'tune', budget=70, reduced=('--small', '--repeats', '1'))],
    [timed('r50', 'r50', *IMAGENET, *FAST)],
    [
        timed(
            *('r50, compiled', 'r50', *IMAGENET, *FAST, '--compile'),
            variants=(*COMPILED, 'mrla-light', 'kcla'),
            warm='r50',
            budget=70,
        )
    ],
    [timed('faster-rcnn', 'faster-rcnn', *FAST)],
    [timed('r101', 'r101', *IMAGENET, *FAST)],
    [timed('r50, fp32', 'r50', *IMAGENET)],
    [timed('mask-rcnn', 'mask-rcnn', *FAST)],
    [timed('r50, inference', 'r50', *IMAGENET, *FAST, tool='inference')],
    [
        Part(
            'hook',
            'hook_overhead',
            (
                *('--net', 'r50', *IMAGENET, *FAST),
                *('--rounds', '40', '--limit', '12', '--imports', '1'),
            ),
            reduced=(*TINY, '--imports', '1'),
        )
    ],
    [Part('rewrap', 'rewrap', ('--net', 'r50'), reduced=('--net', 'cifar20'))],
    [
        timed(
            *('faster-rcnn, compiled', 'faster-rcnn', *FAST, '--compile'),
            variants=COMPILED,
            warm='faster-rcnn',
            budget=60,
        )
    ],
    [
        timed(
            *('r101, compiled', 'r101', *IMAGENET, *FAST, '--compile'),
            variants=COMPILED,
            warm='r101',
            budget=70,
        )
    ],
    [timed('faster-rcnn, inference', 'faster-rcnn', *FAST, tool='inference')],
    [
        timed(
            *('mask-rcnn, compiled', 'mask-rcnn', *FAST, '--compile'),
            variants=COMPILED,
            warm='faster-rcnn',  # the same backbone
            budget=60,
        )
    ],
    [timed('r50, contiguous', 'r50', *IMAGENET, '--dtype', 'bf16')],
    [timed('r101, fp32', 'r101', *IMAGENET)],
]
PARTS = [part for group in GROUPS for part in group]

# Of the GPU: part, variant, what of it, beside what, at most
GOALS = (
    ('r50', 'mrla-base', 'ratio', 'published', 0.65),
    ('r50', 'ela', 'ratio', 'published', 0.55),
    ('r50', 'ela', 'ratio', 'resnet', 1.15),
    ('r101', 'mrla-base', 'memory_ratio', 'published', 0.6),
)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', metavar='OUT', help='folder for the results')
    parser.add_argument(
        '--limit',
        type=float,
        default=520,
        help='seconds after which everything stops (default: %(default)s)',
    )
    parser.add_argument(
        '--reduced', action='store_true', help='tiny networks (always without a GPU)'
    )
    names = [part.name for part in PARTS]
    parser.add_argument(
        '--parts',
        nargs='+',
        choices=names,
        metavar='PART',
        help=f'only these: {", ".join(n for n in names if not n.startswith("warm"))} '
        '(default: all); with reduced networks only those that have any',
    )
    return parser.parse_args(argv)


@dataclass
class Run:
    """Parts in their processes, and the files that they leave behind.

    Args:
        out (Path): Folder for the results.
        end (float): ``time.monotonic()`` at which everything stops.
        reduced (bool): Whether networks are tiny.
    """

    out: Path
    end: float
    reduced: bool
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))
    parts: Dict[str, dict] = field(default_factory=dict)
    running: Dict[str, Any] = field(default_factory=dict)
    method: str = 'forkserver'

    def set_environment(self) -> None:
        """Set what the processes of all parts are to find."""
        # Whether there is a GPU is asked of the driver's library, which leaves CUDA
        # alone, so that processes forked afterwards can start it for themselves
        os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'
        os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '4')
        os.environ['MMELA_TRITON_BLOCKS'] = str(self.blocks)
        shutil.copy(ROOT / 'mmela' / 'ops' / 'triton_blocks.json', self.blocks)
        if self.reduced:
            os.environ['TRITON_INTERPRET'] = '1'
            os.environ['CUDA_VISIBLE_DEVICES'] = ''

    @property
    def blocks(self) -> Path:
        return self.out / 'triton_blocks.json'

    def file(self, name: str) -> Path:
        return self.folder / f'{re.sub("[^a-z0-9]+", "-", name)}.json'

    def start(self, part: Part) -> None:
        """Start the process of a part."""
        arguments = list(part.reduced or () if self.reduced else part.arguments)
        variants = [
            v
            for v in part.variants
            if not part.warm or self.status(f'warm {part.warm} {v}') == 'done'
        ]
        if self.reduced:
            variants = variants[:3]
        if part.variants and not variants:
            self.parts[part.name] = dict(status='nothing compiled', seconds=0.0)
            return
        if variants:
            arguments += ['--variants', *variants]
        context: Any = multiprocessing.get_context(self.method)
        if self.method == 'forkserver':
            context.set_forkserver_preload(list(PRELOAD))
        process = context.Process(
            target=work,
            args=(part.tool, arguments, str(self.file(part.name)), str(self.log)),
        )
        process.start()
        self.running[part.name] = process
        self.parts[part.name] = dict(
            status='running', begin=time.monotonic(), arguments=arguments
        )

    @property
    def log(self) -> Path:
        return self.out / 'log.txt'

    def status(self, name: str) -> str:
        return self.parts.get(name, {}).get('status', 'not begun')

    def run(self, group: Sequence[Part]) -> None:
        """Run parts at the same time, each until it is done or its time is up."""
        for part in group:
            self.start(part)
        budgets = {part.name: part.budget for part in group}
        while self.running:
            for name in list(self.running):
                spent = time.monotonic() - self.parts[name]['begin']
                process = self.running[name]
                process.join(POLL / len(self.running) / 4)
                if not process.is_alive():
                    code = process.exitcode
                    self.finish(name, 'done' if code == 0 else f'failed ({code})')
                elif spent > budgets[name] or time.monotonic() > self.end:
                    self.finish(name, 'stopped')
            self.write()

    def finish(self, name: str, status: str) -> None:
        """End a part's process and all that it has started."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # where it has no group of its own yet
        process.join()
        begin = self.parts[name].pop('begin')
        self.parts[name].update(status=status, seconds=time.monotonic() - begin)
        if not name.startswith('warm'):
            self.tell(f'{name}: {status}, {self.parts[name]["seconds"]:.0f} s')

    def tell(self, text: str) -> None:
        left = self.end - time.monotonic()
        print(f'{text}; {left:.0f} s left', file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End what runs, keep what it has written."""
        for name in list(self.running):
            self.finish(name, 'stopped')
        self.write()
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self) -> None:
        """Write results.json and tables.md as far as they are known."""
        for name, part in self.parts.items():
            with suppress(OSError, ValueError):
                part['results'] = json.loads(self.file(name).read_text())
        parts = {
            name: {key: value for key, value in part.items() if key != 'begin'}
            for name, part in self.parts.items()
        }
        write_results(
            str(self.out / 'results.json'),
            dict(tool='gpu', reduced=self.reduced, parts=parts),
            tell=False,
        )
        try:
            (self.out / 'tables.md').write_text(tables(parts, self.reduced))
        except Exception:  # a flaw in a table must not cost the parts to come
            traceback.print_exc()


def work(tool: str, arguments: List[str], out: str, log: str) -> None:
    """What the process of a part does.

    Args:
        tool (str): See :class:`Part`.
        arguments (list[str]): Command line of the tool.
        out (str): JSON file for the results.
        log (str): File that what it prints is appended to.
    """
    os.setsid()  # all that it starts can be ended with it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    print(f'\n== {tool} {" ".join(arguments)}', flush=True)
    from . import parts

    main: Callable[[List[str]], None] = getattr(parts, tool)
    main([*arguments, '--out', out])
    sys.stdout.flush()


def tables(parts: Dict[str, dict], reduced: bool) -> str:
    """What is known so far, for docs/performance.md.

    Args:
        parts (dict[str, dict]): By name ``status``, ``seconds`` and ``results``.
        reduced (bool): Whether networks were tiny.

    Returns:
        str: Markdown.
    """
    from . import compare, hook_overhead, tune

    done = {name: p['results'] for name, p in parts.items() if p.get('results')}
    lines = ['# Measurements']
    if reduced:
        lines += ['', '**Tiny networks: none of these times means anything.**']
    for name, title in (
        ('train_step', 'Training step'),
        ('inference', 'Inference'),
    ):
        found = [r for n, r in done.items() if _timed(n, r, name)]
        if found:
            lines += ['', f'## {title}', '', compare.summary_table(found)]
    if _timed('', done.get('r50', {}), 'train_step'):
        lines += ['', '## Goals', '', _goals(done)]
    if done.get('tune', {}).get('times'):
        lines += ['', '## Triton kernels', '', tune.table(done['tune'])]
    if 'hook' in done:
        lines += ['', '## Pruning hook', '', hook_overhead.table(done['hook'])]
    if 'rewrap' in done:
        r = done['rewrap']
        lines += [
            '',
            '## Wrapping for distributed training anew',
            '',
            f'{r["net"]}: {r["median"] * 1e3:.1f} ms (IQR {r["iqr"] * 1e3:.1f}) in one '
            f'process over {r["backend"]}',
        ]
    if 'checks' in done:
        checks = done['checks']
        lines += ['', '## Checks', '', checks['summary'], *checks['failed']]
    rows = [
        [name, part['status'], f'{part.get("seconds", 0):.0f}']
        for name, part in parts.items()
    ]
    lines += ['', '## Parts', '', format_table(['part', 'status', 's'], rows)]
    for name, result in done.items():
        if _timed(name, result, 'train_step') or _timed(name, result, 'inference'):
            lines += ['', f'## {name}, in full', '', compare.table(result)]
    return '\n'.join(lines) + '\n'


def _timed(name: str, result: dict, tool: str) -> bool:
    """Whether a part's results are times of a tool."""
    variants = result.get('variants', {})
    return (
        result.get('tool') == tool
        and not name.startswith('warm')
        and any('median' in v for v in variants.values())
    )


def _goals(done: Dict[str, dict]) -> str:
    rows = []
    for part, variant, key, reference, most in GOALS:
        # Its fastest form: Triton's where that was measured too
        values = [
            result[key][reference]
            for name, result in done.get(part, {}).get('variants', {}).items()
            if name.split(':')[0] == variant and reference in result.get(key, {})
        ]
        what = 'time' if key == 'ratio' else 'peak memory'
        value = f'{min(values):.2f}' if values else 'not measured'
        rows.append([f'{part}, {variant}: {what} x {reference}', f'{most}', value])
    return format_table(['goal', 'at most', 'measured'], rows)


def main(argv=None) -> int:
    args = parse_args(argv)
    begin = time.monotonic()
    out = Path(args.out).resolve()
    if out.exists() and not out.is_dir():
        raise SystemExit(f'error: OUT={out} is not a folder')
    out.mkdir(parents=True, exist_ok=True)
    (out / 'log.txt').write_text('')
    on_gpu = (
        shutil.which('nvidia-smi') is not None
        and not subprocess.run(['nvidia-smi', '-L'], capture_output=True).returncode
    )
    run = Run(out, begin + args.limit, args.reduced or not on_gpu)
    run.set_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        device = Part('device', 'device', budget=90, reduced=())
        run.run([device])
        if run.status('device') != 'done' and not run.reduced:
            # CUDA does not start in a process that was forked: slower, then
            run.method = 'spawn'
        for group in GROUPS:
            group = [
                part
                for part in group
                if (args.parts is None or part.name in args.parts)
                and not (run.reduced and part.reduced is None)
            ]
            if group and run.end - time.monotonic() > LEAST:
                run.run(group)
    finally:
        run.stop()
    print(out / 'tables.md')
    bad = [n for n in run.parts if run.status(n).startswith('failed')]
    checks = run.parts.get('checks', {}).get('results', {})
    return 1 if bad or checks.get('failed') else 0


if __name__ == '__main__':
    sys.exit(main())
