"""Upload a pruned network to the Hugging Face Hub.

It uploads the slim network as safetensors, its config, its pruning decisions, and a
card with metrics, masks and the table of each pruning. Log in first with
`hf auth login`. Wherever mmela is imported, hf://USER/REPO then works as a
checkpoint.

Example:
  mmela push work_dirs/ela/my_config.py \\
      work_dirs/ela/epoch_12.pth alice/faster-rcnn-ela --license apache-2.0
"""

import argparse
import json
import tempfile
from pathlib import Path

from mmela_light.arguments import tool_parser


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('push', __doc__)
    parser.add_argument('config', help='config of the network, pruned or slim')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('repo', metavar='USER/REPO', help='repository on the Hub')
    parser.add_argument(
        '--work-dir',
        help='work directory of the run, for metrics and decisions (default: the '
        'folder of the checkpoint)',
    )
    parser.add_argument(
        '--metrics',
        help='JSON file of metrics, such as the one that mmela test writes to its '
        'work directory (default: metrics of the validation at the checkpoint)',
    )
    parser.add_argument('--license', help='license of the weights, such as apache-2.0')
    parser.add_argument(
        '--private', action='store_true', help='create a new repository as private'
    )
    parser.add_argument(
        '--out', help='write the files to this new folder instead of uploading them'
    )
    return parser.parse_args(argv)


def validated(work_dir: Path, meta: dict) -> dict:
    """Metrics of the validation at a checkpoint; empty if there was none."""
    from ..analysis.work_dir import Run

    try:
        run = Run(work_dir)
    except FileNotFoundError:
        return {}
    metrics = run.metrics.get(meta.get('epoch' if run.unit == 'epoch' else 'iter'), {})
    return {key: value for key, value in metrics.items() if value != -1}


def read_metrics(path: str) -> dict:
    """Read the numbers of a JSON file.

    Raises:
        ValueError: If the file is not a JSON object with numbers.
    """
    try:
        content = json.loads(Path(path).read_text('utf-8'))
        metrics = {k: v for k, v in content.items() if isinstance(v, (int, float))}
    except (AttributeError, ValueError) as error:
        raise ValueError(f'{path} is not a JSON object: {error}') from error
    if not metrics:
        raise ValueError(f'{path} has no number')
    return metrics


def main(argv=None) -> None:
    args = parse_args(argv)
    work_dir = Path(args.work_dir or Path(args.checkpoint).parent)
    from ..command_line import one_line_errors
    from ..convert.hub import upload, write_repository
    from ..convert.networks import NETWORK_ERRORS
    from ..convert.slim import slim_network

    with one_line_errors(*NETWORK_ERRORS):
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(args.repo)
        if args.repo.count('/') != 1:
            raise ValueError(f'{args.repo!r} does not have the form USER/REPO')
        slim = slim_network(args.config, args.checkpoint, *filter(None, [args.out]))
        if args.metrics:
            metrics = read_metrics(args.metrics)
        else:
            metrics = validated(work_dir, slim.meta)
        if not metrics:
            print(
                f'{work_dir} has no metrics for this checkpoint, so the card has none'
            )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.out or temporary)
            write_repository(folder, args.repo, slim, metrics, work_dir, args.license)
            if args.out:
                print(
                    f'{folder}: {", ".join(sorted(p.name for p in folder.iterdir()))}'
                )
            else:
                print(upload(folder, args.repo, args.private))
