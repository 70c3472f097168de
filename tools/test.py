"""Test a detector or a classifier with the toolbox's own tools/test.py.

usage: python tools/test.py CONFIG CHECKPOINT [arguments of its test.py]

A pruned checkpoint needs no further option: its structure is part of it.

Example:
  python tools/test.py \\
      configs/faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py \\
      work_dirs/ela/epoch_12.pth
"""

import sys

from mmela.command_line import run_tool

if __name__ == '__main__':
    run_tool('test.py', sys.argv[1:], __doc__, files=('checkpoint',))
