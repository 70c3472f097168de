"""Run a study: compare several configs with several seeds.

It runs them in parallel on the cores or GPUs of this machine, or on a Ray
cluster, continues where it was interrupted, and writes tables and a page.
docs/studies.md describes study files.

Examples:
  mmela study configs/studies/shapes.yml --dry-run
  mmela study configs/studies/shapes.yml --jobs 2
  mmela study configs/studies/shapes.yml --report
"""

import argparse
import shlex
from functools import partial
from pathlib import Path

from mmela_light.arguments import add_cfg_options, tool_parser

PAGES = Path(__file__).resolve().parents[1] / 'docs' / 'results'


def between(kind: type, low: float, high: float = float('inf')):
    """Make an argument type for numbers from ``low`` to ``high``."""

    def number(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{value} is not in {low} to {high}')
        return value

    return number


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('study', __doc__)
    parser.add_argument('study', metavar='STUDY.yml', help='the study file')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/studies'),
        metavar='OUT',
        help='runs go to OUT/NAME/VARIANT/seed_S (default: %(default)s)',
    )
    parser.add_argument('--dry-run', action='store_true', help='only print the plan')
    parser.add_argument(
        '--page',
        nargs='?',
        type=Path,
        const=PAGES,
        metavar='DIR',
        help='at the end, write the page NAME.md with a picture and tables to DIR '
        '(default: docs/results in the checkout). Without this option, only tables '
        'are written, beside the runs',
    )
    parser.add_argument(
        '--report',
        action='store_true',
        help='run nothing; write the page for the existing runs',
    )
    parser.add_argument(
        '--jobs',
        type=between(int, 1),
        metavar='N',
        help='number of parallel runs (default: one per GPU, or else as many as the '
        'cores allow)',
    )
    parser.add_argument(
        '--threads',
        type=between(int, 1),
        default=1,
        help='threads per run (default: 1)',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        metavar='VARIANT',
        help='run only these variants, and those that they start from',
    )
    parser.add_argument('--seeds', nargs='+', type=int, help='run only these seeds')
    add_cfg_options(parser, 'change settings of all configs')
    parser.add_argument(
        '--retries',
        type=between(int, 0),
        default=2,
        help='maximum number of restarts of a run that died (default: 2)',
    )
    parser.add_argument(
        '--time-limit',
        type=between(float, 0.001),
        default=168,
        metavar='HOURS',
        help='kill and restart a run that takes longer, for example because it hangs '
        '(default: 168)',
    )
    parser.add_argument(
        '--accept-changed',
        action='store_true',
        help='use existing runs even if their settings differ from the study',
    )
    parser.add_argument(
        '--address',
        help="run on the Ray cluster at this address ('auto', HOST:PORT, or 'local' "
        'to start one here). All nodes must see the checkout, the data and OUT under '
        'the same paths',
    )
    parser.add_argument(
        '--gpus-per-run',
        type=between(float, 0, 1),
        metavar='N',
        help='GPUs per run on a cluster, up to 1; several runs may share one '
        '(default: 1 if the cluster has GPUs)',
    )
    args = parser.parse_args(argv)
    if args.address and args.jobs:
        parser.error('--jobs is only for this machine; remove it or --address')
    if args.gpus_per_run is not None and not args.address:
        parser.error('--gpus-per-run is only for a cluster; give its --address')
    return args


def check_changes(jobs, accept: bool) -> None:
    """Reject existing runs with other settings."""
    text = ''
    for job in jobs:
        lines = job.changes()
        if lines:
            more = [f'... and {len(lines) - 8} more'] if len(lines) > 8 else []
            text += f'\n{job.name} in {job.work_dir}:'
            text += ''.join(f'\n  {line}' for line in [*lines[:8], *more])
    if text and not accept:
        raise ValueError(
            f'the settings of these runs differ from the study:{text}\n'
            'Move the runs away, or pass --accept-changed to use them anyway'
        )
    if text:
        print(f'Using runs whose settings differ from the study:{text}')


def run(args: argparse.Namespace) -> int:
    """Run the tool; returns the exit code."""
    from mmela.studies.driver import (
        LocalExecutor,
        RayExecutor,
        run_all,
        visible_cores,
        visible_gpus,
    )
    from mmela.studies.page import portable, write_page
    from mmela.studies.plan import plan, prepare
    from mmela.studies.results import collect, write_tables
    from mmela.studies.run import make_jobs, select
    from mmela.studies.study import read_study
    from mmela.studies.train import Limits

    study = read_study(args.study, args.cfg_options)
    for name in args.only or []:
        if name not in study.variants:
            raise ValueError(
                f'--only names {name!r}, which is not a variant; allowed are '
                f'{", ".join(study.variants)}'
            )
    for seed in args.seeds or []:
        if seed not in study.seeds:
            raise ValueError(
                f'--seeds names {seed}, which is not in the study; allowed are '
                f'{study.seeds}'
            )
    seeds = [seed for seed in study.seeds if not args.seeds or seed in args.seeds]
    every = make_jobs(study, args.work_dir, study.seeds)
    jobs = select([job for job in every if job.seed in seeds], args.only)
    check_changes(jobs, args.accept_changed)
    limits = Limits(args.threads, args.retries, args.time_limit)
    if args.address:
        executor = RayExecutor(args.address, limits, args.gpus_per_run)
        slots = executor.slots
    else:
        slots = args.jobs or len(visible_gpus())
        slots = slots or max(1, visible_cores() // args.threads)
        executor = LocalExecutor(slots)
    with executor:
        for line in plan(jobs, every, slots):
            print(line, flush=True)
        if args.dry_run:
            return 0
        failures = {}
        if not args.report and not all(job.done for job in jobs):
            prepare(study.prepare)
            describe = partial(final_metric, study.metric)
            failures = run_all(jobs, executor, limits, describe)
    for name, reason in failures.items():
        print(f'{name}: {reason.partition(chr(10))[0]}')
    runs, layers = collect(study, every)
    folder = args.page or (PAGES if args.report else args.work_dir / study.name)
    written = write_tables(runs, layers, folder / f'{study.name}.csv')
    if args.page or args.report:
        command = f'mmela study {portable(study.path)}'
        command += ''.join(f' {word}' for word in given_options(args.cfg_options))
        page = folder / f'{study.name}.md'
        written += write_page(study, every, runs, layers, written, page, command)
    print('Written: ' + ', '.join(map(str, written)))
    return 1 if failures else 0


def final_metric(metric: str, job) -> str:
    """Describe the result of a run in one line."""
    from mmela.command_line import one_line

    try:
        values = job.final_metrics()
    except ValueError as error:
        return one_line(error)
    if not values:
        return 'the final validation is missing'
    if metric in values:
        return f'{metric} {values[metric]:.4g}'
    return f'there is no metric {metric!r}, only {", ".join(values)}'


def given_options(options: dict) -> list:
    """The options for all configs, as given on the command line."""
    from mmela.studies.study import option_texts

    if not options:
        return []
    return ['--cfg-options', *(shlex.quote(text) for text in option_texts(options))]


def main(argv=None) -> None:
    args = parse_args(argv)
    from mmela.command_line import one_line

    try:
        code = run(args)
    except (OSError, ValueError) as error:
        text = str(error) if '\n' in str(error) else one_line(error)
        raise SystemExit(f'error: {text}') from error
    raise SystemExit(code)


if __name__ == '__main__':
    main()
