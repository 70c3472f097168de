"""Train, prune and evaluate a small detector, starting from nothing.

It renders a small data set in COCO format and trains a Faster R-CNN with a
narrow ELA-ResNet-50 on it. It prunes redundant layer attentions when they have
learned, and again after epoch 7, and evaluates with COCO metrics. Then it measures
attention maps before the last pruning and after training, runs both networks on
validation images, and writes a report with pictures.

Examples:
  mmela demo
  mmela demo --work-dir work_dirs/mine \\
      --cfg-options data_root=data/coco
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, List

from mmela_light.arguments import add_cfg_options, tool_parser

if TYPE_CHECKING:
    from mmela.analysis.work_dir import Run

ROOT = Path(__file__).resolve().parents[1]
# An installed copy must not write beside itself
FOLDER = Path() if ROOT.name == '.mim' else ROOT
CONFIG = ROOT / 'configs' / 'demo' / 'faster-rcnn_r50-narrow_ela_fpn_shapes.py'


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('demo', __doc__)
    parser.add_argument(
        '--work-dir',
        default=FOLDER / 'work_dirs' / 'demo',
        help='folder for logs, checkpoints and the report (default: work_dirs/demo '
        'in the checkout, or else in the current folder)',
    )
    parser.add_argument(
        '--resume',
        action='store_true',
        help='resume from the last checkpoint in the work directory',
    )
    add_cfg_options(
        parser,
        'change settings of the config; set only data_root=DIR to train on '
        'another data set in COCO format',
    )
    return parser.parse_args(argv)


def checkpoints_to_measure(run: 'Run') -> List[Path]:
    """Choose checkpoints whose attention maps show the effect of pruning.

    Args:
        run (Run): A finished run.

    Returns:
        list[Path]: The last checkpoint before the last pruning, if it exists, and the
        final one.
    """
    final = run.checkpoint
    if final is None:
        return []
    checkpoints = [final]
    if run.decisions:
        last = run.decisions[-1]
        numbered = run.numbered_checkpoints()
        # The hook prunes before mmengine writes the checkpoint of that epoch
        before = [n for n in numbered if n < last.window[1]]
        if before:
            checkpoints.insert(0, numbered[max(before)])
    return checkpoints


def measure(work_dir: str, images: int = 100) -> None:
    """Measure the layer attentions for the report.

    This is like mmela layer-attention, but without pictures, which the report draws.

    Args:
        work_dir (str): Work directory of the run.
        images (int): Maximum number of validation images. Defaults to 100.
    """
    from mmela.analysis.attention import (
        hook_settings,
        measure_attention,
        save_measurement,
    )
    from mmela.analysis.inputs import load_network, validation_loader
    from mmela.analysis.work_dir import Run

    run = Run(work_dir)
    config = run.work_dir / run.config_name
    for checkpoint in checkpoints_to_measure(run):
        print(f'Measuring the attention maps of {checkpoint.name}', flush=True)
        cfg, model = load_network(config, checkpoint)
        settings = hook_settings(cfg)
        settings.pop('source')
        result = measure_attention(model, validation_loader(cfg, images), **settings)
        save_measurement(
            run.work_dir / 'layer_attention' / checkpoint.stem,
            config,
            checkpoint,
            'validation data',
            result,
        )


def main(argv=None) -> None:
    args = parse_args(argv)
    from mmengine.config import Config
    from mmengine.registry import RUNNERS

    from mmela.analysis import make_report, measure_before_after, summarize
    from mmela.command_line import one_line_errors
    from mmela.tools.shapes import make_shapes

    start = time.time()
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(args.cfg_options)
    if 'data_root' not in args.cfg_options:
        cfg.data_root = f'{FOLDER}/data/shapes/'
        print(f'Rendering the data set in {cfg.data_root}', flush=True)
        try:
            make_shapes(cfg.data_root)
        except OSError as error:
            raise SystemExit(f'error: {error}') from error
    annotations = Path(cfg.data_root) / 'annotations/instances_train2017.json'
    if not annotations.is_file():
        raise SystemExit(
            f'error: data_root={cfg.data_root} is not a data set in COCO format: there '
            f'is no file {annotations}'
        )
    cfg.work_dir = str(args.work_dir)
    cfg.resume = args.resume
    with one_line_errors(OSError, ValueError):
        runner = RUNNERS.build(cfg)
    runner.train()

    for what, step in (
        ('Attention maps', measure),
        ('Detections', measure_before_after),
    ):
        try:
            step(cfg.work_dir)
        except (OSError, ValueError, SystemExit) as error:
            # The report is useful without these measurements
            print(f'{what} are not measured: {error}')
    make_report(cfg.work_dir)
    print(summarize(cfg.work_dir))
    print(f'Done in {(time.time() - start) / 60:.1f} min')


if __name__ == '__main__':
    main()
