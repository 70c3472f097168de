"""Draw results of train_step.py and inference.py as bars.

One panel for each file: times relative to the reference, and peak memory. The
title says what was measured on which machine.

Example:
  python -m tools.benchmark.plot r50.json r101.json --out speed.svg
"""

import argparse
import json
from pathlib import Path
from typing import List, Sequence, Tuple

import matplotlib
from matplotlib.figure import Figure

from .compare import REFERENCES, title

COLORS = {'time': '#3b6fb6', 'peak memory': '#e0a030'}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('results', nargs='+', help='JSON files')
    parser.add_argument('--out', required=True, help='picture: .png, .svg or .pdf')
    parser.add_argument(
        '--reference',
        choices=REFERENCES,
        default='published',
        help='variant that is 1 (default: %(default)s)',
    )
    return parser.parse_args(argv)


def load(path: str, reference: str) -> dict:
    """Read results and check that they can be drawn.

    Args:
        path (str): JSON file.
        reference (str): Variant that ratios are to.

    Returns:
        dict: The results.

    Raises:
        SystemExit: If the file holds none, or they are without the reference.
    """
    try:
        results = json.loads(Path(path).read_text())
        variants = results['variants']
        known = results['tool'] in ('train_step', 'inference')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f'error: {path}: {error!r}') from None
    if not known:
        raise SystemExit(
            f'error: {path} is of {results["tool"]}; allowed are '
            'train_step and inference'
        )
    if 'median' not in variants.get(reference, {}):
        raise SystemExit(
            f'error: {path} has no results of {reference!r}; '
            f'measured are {", ".join(variants)}'
        )
    return results


def bars(results: dict, reference: str) -> Tuple[List[str], List[float], List[float]]:
    """What to draw.

    Args:
        results (dict): Results of one file.
        reference (str): Variant that ratios are to.

    Returns:
        tuple[list[str], list[float], list[float]]: Variants, and their ratios
        of time and of memory. Variants that were not measured are left out.
    """
    measured = {
        name: result
        for name, result in results['variants'].items()
        if 'ratio' in result
    }
    return (
        list(measured),
        [r['ratio'][reference] for r in measured.values()],
        [r['memory_ratio'][reference] for r in measured.values()],
    )


def draw(all_results: Sequence[dict], reference: str) -> Figure:
    """Draw one panel per file.

    Args:
        all_results (Sequence[dict]): Results of the files.
        reference (str): Variant that ratios are to.

    Returns:
        Figure: The picture.
    """
    count = len(all_results)
    figure = Figure(figsize=(8, 3.6 * count), layout='constrained')
    panels = figure.subplots(count, squeeze=False)[:, 0]
    for results, axes in zip(all_results, panels):
        names, times, memory = bars(results, reference)
        for shift, label, values in (
            (-0.2, 'time', times),
            (0.2, 'peak memory', memory),
        ):
            drawn = axes.bar(
                [i + shift for i in range(len(names))],
                values,
                width=0.38,
                color=COLORS[label],
                label=label,
            )
            axes.bar_label(drawn, fmt='%.2f', fontsize=8)
        axes.set_xticks(range(len(names)), names)
        axes.axhline(1, color='0.4', linewidth=0.8, linestyle='--', zorder=0)
        axes.margins(y=0.15)
        axes.set_ylabel(f'relative to {reference}')
        axes.set_title(title(results), fontsize=9)
        axes.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
        axes.spines[['top', 'right']].set_visible(False)
    return figure


def main(argv=None) -> None:
    args = parse_args(argv)
    all_results = [load(path, args.reference) for path in args.results]
    out = Path(args.out)
    if out.suffix not in ('.png', '.svg', '.pdf'):
        raise SystemExit(f'error: --out={out} does not end in .png, .svg or .pdf')
    out.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams['svg.hashsalt'] = 'mmela'
    draw(all_results, args.reference).savefig(out, dpi=150)
    print(out)


if __name__ == '__main__':
    main()
