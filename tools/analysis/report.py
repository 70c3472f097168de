"""Write one page on a training run: report.html, which opens offline.

It shows the metrics, the loss, which layer attentions were pruned when and
why, what that brought, and the config. The pictures also go to pictures/ in
the work directory.

Example:
  python tools/analysis/report.py work_dirs/demo
"""

import argparse

from mmela.analysis import make_report, summarize
from mmela.command_line import one_line


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'work_dir', metavar='WORK_DIR', help='work directory of the run'
    )
    parser.add_argument(
        '--out', metavar='FILE', help='the page (default: report.html in WORK_DIR)'
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        report = make_report(args.work_dir, args.out)
        print(summarize(args.work_dir, report))
    except (OSError, ValueError) as error:
        raise SystemExit(f'error: {one_line(error)}') from error


if __name__ == '__main__':
    main()
