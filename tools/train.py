"""Train a detector or a classifier with the toolbox's own tools/train.py.

usage: mmela train CONFIG [arguments of the toolbox's train.py]

CONFIG is a file, or a config that a toolbox ships, such as
mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py.
Common arguments: --work-dir DIR, --resume [CHECKPOINT], --amp, --auto-scale-lr,
--cfg-options KEY=VALUE ...
--channels-last runs the backbone in channels_last, which is faster on a CPU.

Example:
  mmela train \\
      configs/faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py \\
      --work-dir work_dirs/ela
"""

import sys

from mmela_light.arguments import show_usage


def main() -> None:
    arguments = sys.argv[1:]
    show_usage(arguments, __doc__)
    from mmela.command_line import run_tool

    run_tool('train.py', arguments)


if __name__ == '__main__':
    main()
