"""Run a study: several configs with several seeds, compared.

Runs side by side on the cores or GPUs of this machine, or on a Ray cluster,
goes on where it was interrupted, and writes tables and a page. A study file
is described in docs/studies.md.

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
    """A type of arguments: a number from ``low`` to ``high``."""

    def number(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{value} is not {low} to {high}')
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
    parser.add_argument('--dry-run', action='store_true', help='print the plan and end')
    parser.add_argument(
        '--page',
        nargs='?',
        type=Path,
        const=PAGES,
        metavar='DIR',
        help='write the page NAME.md with picture and tables to DIR at the end '
        '(default: docs/results in the checkout); without, tables go beside the '
        'runs and no page is written',
    )
    parser.add_argument(
        '--report',
        action='store_true',
        help='run nothing, write the page of what there is',
    )
    parser.add_argument(
        '--jobs',
        type=between(int, 1),
        metavar='N',
        help='runs side by side (default: one for each GPU, or else as many as '
        'the cores allow)',
    )
    parser.add_argument(
        '--threads',
        type=between(int, 1),
        default=1,
        help='threads of a run (default: 1)',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        metavar='VARIANT',
        help='run these variants, and those that they start from',
    )
    parser.add_argument('--seeds', nargs='+', type=int, help='run these seeds')
    add_cfg_options(parser, 'change settings of all configs')
    parser.add_argument(
        '--retries',
        type=between(int, 0),
        default=2,
        help='how often a run that died is started again (default: 2)',
    )
    parser.add_argument(
        '--time-limit',
        type=between(float, 0.001),
        default=168,
        metavar='HOURS',
        help='end a run that takes longer, as one that hangs does, and start it again '
        'as one that died (default: 168)',
    )
    parser.add_argument(
        '--accept-changed',
        action='store_true',
        help='take runs as they are that were made with other settings than the '
        'study has now',
    )
    parser.add_argument(
        '--address',
        help="run on the Ray cluster at this address ('auto', HOST:PORT, or 'local' "
        'to start one here). Checkout, data and OUT have to be on a file system '
        'that all nodes have in the same place',
    )
    parser.add_argument(
        '--gpus-per-run',
        type=between(float, 0, 1),
        metavar='N',
        help='on a cluster: GPUs of a run, up to 1, which several may share '
        '(default: 1 if the cluster has any)',
    )
    args = parser.parse_args(argv)
    if args.address and args.jobs:
        parser.error('--jobs is for this machine; the cluster runs what fits on it')
    if args.gpus_per_run is not None and not args.address:
        parser.error('--gpus-per-run is for a cluster: give its --address')
    return args


def check_changes(jobs, accept: bool) -> None:
    """Refuse runs that were made with other settings."""
    text = ''
    for job in jobs:
        lines = job.changes()
        if lines:
            more = [f'... and {len(lines) - 8} more'] if len(lines) > 8 else []
            text += f'\n{job.name} in {job.work_dir}:'
            text += ''.join(f'\n  {line}' for line in [*lines[:8], *more])
    if text and not accept:
        raise ValueError(
            f'these runs were made with other settings than the study has now:{text}\n'
            'Move them away, or take them as they are by --accept-changed'
        )
    if text:
        print(f'Made with other settings, and taken as they are:{text}')


def run(args: argparse.Namespace) -> int:
    """Do what is asked for; the exit code."""
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
                f'--only names {name!r}, which is none of the variants '
                f'{", ".join(study.variants)}'
            )
    for seed in args.seeds or []:
        if seed not in study.seeds:
            raise ValueError(f'--seeds names {seed}; the study has {study.seeds}')
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
    """The result of a run, for a line."""
    from mmela.command_line import one_line

    try:
        values = job.final_metrics()
    except ValueError as error:
        return one_line(error)
    if not values:
        return 'its last validation is missing'
    if metric in values:
        return f'{metric} {values[metric]:.4g}'
    return f'it has no {metric!r}, but {", ".join(values)}'


def given_options(options: dict) -> list:
    """The options of all configs, as they were given."""
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
