"""Export the network of a checkpoint to ONNX, torch.export or TorchScript.

Whole classifiers and detectors become ONNX (.onnx) or a torch.export program
(.pt2), including pre-processing, decoding and non-maximum suppression. With
--backbone, only the backbone becomes ONNX or TorchScript (.pt).

The result takes any batch size and image size, and has no pruned attentions.
ONNX needs onnx and onnxscript: pip install "mmela[export]".

Examples:
  mmela export my_config.py epoch_12.pth detector.onnx
  mmela export my_config.py epoch_12.pth backbone.onnx \\
      --backbone
"""

import argparse
from pathlib import Path

from mmela_light.arguments import tool_parser


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('export', __doc__)
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument(
        'out', help='.onnx for ONNX, .pt2 for torch.export, .pt for TorchScript'
    )
    parser.add_argument(
        '--backbone',
        action='store_true',
        help='export only the backbone, which takes normalized images',
    )
    parser.add_argument(
        '--normalized',
        action='store_true',
        help='make a whole network take normalized images in float32 (default: '
        'images as the config loads them, in uint8)',
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='image size in pixels for tracing (default: 320 416, or 224 224 with '
        '--backbone)',
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.backbone and args.normalized:
        raise SystemExit(
            'error: remove --normalized; with --backbone, images are always normalized'
        )
    from ..command_line import one_line_errors
    from ..convert.export import check_export, export_backbone, export_network
    from ..convert.networks import (
        NETWORK_ERRORS,
        build_network,
        load_fitting,
        open_network,
    )
    from ..convert.published import part_of
    from ..layers import AttentionState
    from ..structure import layer_attentions

    with one_line_errors(*NETWORK_ERRORS):
        check_export(args.out, args.backbone)
    cfg, meta, state_dict = open_network(args.config, args.checkpoint, args.out)
    model_cfg = cfg.model
    if args.backbone:
        model_cfg = model_cfg.get('backbone')
        state_dict = part_of(state_dict, 'backbone.')
        for path, part in ((args.checkpoint, state_dict), (args.config, model_cfg)):
            if not part:
                raise SystemExit(f'error: {path} has no backbone')
    options = dict(progress=True)
    if args.size:
        options['size'] = args.size
    with one_line_errors(*NETWORK_ERRORS):
        model = build_network(dict(model_cfg, init_cfg=None), args.config)
        load_fitting(model, state_dict, args.config, args.checkpoint)
        if args.backbone:
            export_backbone(model, args.out, **options)
        else:
            classes = (meta.get('dataset_meta') or {}).get('classes')
            info = dict(classes=list(classes)) if classes else {}
            export_network(
                model, args.out, raw=not args.normalized, info=info, **options
            )
    line = f'{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB'
    attentions = layer_attentions(model).values()
    pruned = sum(a.attention_state == AttentionState.PRUNED for a in attentions)
    if pruned:
        line += f', without {pruned} pruned of {len(attentions)} layer attentions'
    print(line)
