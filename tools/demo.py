"""Main job: train, prune and evaluate a small detector from nothing.

Renders a small data set in COCO format, trains the demo Faster R-CNN with a
narrow ELA-ResNet-50 on it, prunes redundant layer attentions after epochs 1
and 7, evaluates with COCO metrics, and writes a report with pictures.

Examples:
  python tools/demo.py
  python tools/demo.py --work-dir work_dirs/mine \
      --cfg-options data_root=data/coco
"""
import argparse
import time
from pathlib import Path

from dataset.make_shapes import make_shapes
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS

from mmela.analysis import make_report, summarize

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'demo' / 'faster-rcnn_r50-narrow_ela_fpn_shapes.py'


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--work-dir',
        default=ROOT / 'work_dirs' / 'demo',
        help='where logs, checkpoints and the report go (default: '
        'work_dirs/demo in the checkout)')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='go on from the last checkpoint in the work directory')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='change settings of the config; data_root=DIR alone trains on '
        'another data set in COCO layout')
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    start = time.time()
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(args.cfg_options)
    if 'data_root' not in args.cfg_options:
        cfg.data_root = f'{ROOT}/data/shapes/'
        print(f'Rendering the data set in {cfg.data_root}', flush=True)
        make_shapes(cfg.data_root)
    cfg.work_dir = str(args.work_dir)
    cfg.resume = args.resume
    RUNNERS.build(cfg).train()

    make_report(cfg.work_dir)
    print(summarize(cfg.work_dir))
    print(f'Done in {(time.time() - start) / 60:.1f} min')


if __name__ == '__main__':
    main()
