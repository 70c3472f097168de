"""Test a detector or a classifier with the toolbox's own tools/test.py.

usage: mmela test CONFIG CHECKPOINT [--force] [arguments of the toolbox's test.py]

CHECKPOINT is a file of torch or safetensors, or hf://USER/REPO[/FILE]. A pruned
checkpoint includes its structure and needs no further option. A checkpoint that
lacks most keys of the network is rejected unless you pass --force.
--channels-last runs the backbone in channels_last, which is faster on a CPU.

Example:
  mmela test \\
      configs/faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py \\
      work_dirs/ela/epoch_12.pth
"""

import argparse
import sys
from pathlib import Path

from mmela_light.arguments import add_cfg_options, show_usage


def check(arguments, force: bool) -> None:
    """Reject a checkpoint that cannot be read, or comes from a different network.

    The toolbox's tool reports all other errors.
    """
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from mmela.command_line import find_config, one_line_errors
    from mmela.compat.loaders import is_on_hub
    from mmela.convert.networks import (
        NETWORK_ERRORS,
        build_network,
        check_fit,
        read_state_dict,
    )
    from mmela.convert.published import strip_module

    checkpoint = arguments[1] if len(arguments) > 1 else ''
    if not (is_on_hub(checkpoint) or Path(checkpoint).is_file()):
        return
    with one_line_errors(*NETWORK_ERRORS):
        _, state_dict = read_state_dict(checkpoint)
        if force:
            return
        cfg = Config.fromfile(find_config(arguments[0]))
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_cfg_options(parser)
        cfg.merge_from_dict(parser.parse_known_args(arguments[2:])[0].cfg_options)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        model = build_network(cfg.model, arguments[0])
        check_fit(model, strip_module(state_dict), arguments[0], checkpoint)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != '--force']
    show_usage(arguments, __doc__)
    from mmela.command_line import run_tool

    check(arguments, '--force' in sys.argv)
    run_tool('test.py', arguments, files=('checkpoint',))


if __name__ == '__main__':
    main()
