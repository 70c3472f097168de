"""Export the backbone of a checkpoint to ONNX or TorchScript.

Batch and image size stay free. Pruned attentions are not part of the result.

Example:
  python tools/convert/export.py my_config.py epoch_12.pth backbone.onnx
"""

import argparse

from mmengine.registry import MODELS

import mmela  # noqa: F401
from mmela.command_line import one_line
from mmela.convert.export import export_backbone
from mmela.convert.networks import NETWORK_ERRORS, load_fitting, open_network


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', help='.onnx for ONNX, .pt for TorchScript')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='image size to trace with in pixels (default: 224 224)',
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    cfg, _, state_dict = open_network(args.config, args.checkpoint, args.out)
    prefix = 'backbone.'
    state_dict = {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    for path, found in (
        (args.checkpoint, state_dict),
        (args.config, cfg.model.get('backbone')),
    ):
        if not found:
            raise SystemExit(f'error: {path} has no backbone')
    try:
        backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None))
        load_fitting(backbone, state_dict, args.config, args.checkpoint)
        export_backbone(backbone, args.out, args.size)
    except NETWORK_ERRORS as error:
        raise SystemExit(f'error: {one_line(error)}') from error
    print(args.out)


if __name__ == '__main__':
    main()
