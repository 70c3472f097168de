"""Write a page on a training run: report.html, which opens offline.

It shows metrics, loss, predictions on validation images before the first pruning
and at the end, which layer attentions were pruned when and why, the savings, and
the config. The pictures also go to pictures/ and before_after/ in the work
directory.

Example:
  mmela report work_dirs/demo
"""

import argparse
import sys
from typing import Optional

from mmela_light.arguments import tool_parser


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('report', __doc__)
    parser.add_argument(
        'work_dir', metavar='WORK_DIR', help='work directory of the run'
    )
    parser.add_argument(
        '--out', metavar='FILE', help='the page (default: report.html in WORK_DIR)'
    )
    parser.add_argument(
        '--images',
        type=int,
        default=100,
        metavar='N',
        help='number of validation images, evenly spaced, to run before and after '
        'pruning; 0 for none (default: %(default)s)',
    )
    parser.add_argument(
        '--device', metavar='NAME', help='default: an accelerator if there is one'
    )
    return parser.parse_args(argv)


def measure(work_dir: str, images: int, device: Optional[str] = None) -> None:
    """Measure detections before and after; if that fails, only print the reason."""
    from mmela.analysis import measure_before_after
    from mmela.analysis.work_dir import Run
    from mmela.command_line import one_line
    from mmela.convert.networks import NETWORK_ERRORS

    Run(work_dir)  # but an invalid work directory is an error
    try:
        measure_before_after(work_dir, images, device)
    except (SystemExit, *NETWORK_ERRORS) as error:
        reason = one_line(str(error)).replace('error: ', '', 1)
        print(f'Detections are not measured: {reason}', file=sys.stderr)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.images < 0:
        raise SystemExit(f'error: --images={args.images} is negative')
    from mmela.analysis import make_report, summarize
    from mmela.analysis.inputs import check_device
    from mmela.command_line import one_line_errors
    from mmela.files import check_target

    with one_line_errors(OSError, ValueError):
        if args.out:
            check_target(args.out)
        if args.images:
            measure(args.work_dir, args.images, check_device(args.device))
        report = make_report(args.work_dir, args.out)
        print(summarize(args.work_dir, report))


if __name__ == '__main__':
    main()
