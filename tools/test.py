"""Test a detector or a classifier with the toolbox's own tools/test.py.

usage: python tools/test.py CONFIG CHECKPOINT [arguments of its test.py]

CHECKPOINT is a file, of torch or of safetensors, or hf://USER/REPO[/FILE].
A pruned checkpoint needs no further option: its structure is part of it.

Example:
  python tools/test.py \\
      configs/faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py \\
      work_dirs/ela/epoch_12.pth
"""

import sys
from pathlib import Path

from mmela.command_line import one_line, run_tool
from mmela.compat.loaders import is_on_hub
from mmela.convert.networks import read_state_dict


def check(arguments) -> None:
    """Refuse a checkpoint that cannot be read, before the network is built."""
    checkpoint = arguments[1] if len(arguments) > 1 else ''
    if is_on_hub(checkpoint) or Path(checkpoint).is_file():
        try:
            read_state_dict(checkpoint)
        except (ImportError, OSError, ValueError) as error:
            raise SystemExit(f'error: {one_line(error)}') from error


if __name__ == '__main__':
    check(sys.argv[1:])
    run_tool('test.py', sys.argv[1:], __doc__, files=('checkpoint',))
