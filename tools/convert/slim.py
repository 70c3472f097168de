"""Remove pruned layer attentions from a checkpoint and its config.

The slim network gives the same outputs: the tool compares both backbones and
fails if they differ. It leaves out the optimizer and the training state. If the
output ends with .safetensors, it is written in that format, which holds no code
and works as a checkpoint wherever mmela is imported.

Examples:
  mmela slim work_dirs/ela/my_config.py \\
      work_dirs/ela/epoch_12.pth slim.pth
  mmela slim work_dirs/ela/my_config.py \\
      work_dirs/ela/epoch_12.pth slim.safetensors
"""

import argparse
from pathlib import Path

from mmela_light.arguments import tool_parser


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('slim', __doc__)
    parser.add_argument('config', help='config of the pruned network')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', help='slim checkpoint to write: .pth or .safetensors')
    parser.add_argument(
        '--out-config', help='config to write (default: the slim checkpoint with .py)'
    )
    parser.add_argument(
        '--size',
        type=int,
        default=128,
        help='image size in pixels for the comparison (default: %(default)s)',
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    out_config = Path(args.out_config or out.with_suffix('.py'))
    from mmela.command_line import one_line_errors
    from mmela.convert.networks import NETWORK_ERRORS
    from mmela.convert.slim import slim_network

    with one_line_errors(*NETWORK_ERRORS):
        slim = slim_network(
            args.config, args.checkpoint, out, out_config, size=args.size
        )
        slim.save(out, out_config)
    before, after = [
        sum(v.numel() for v in state.values())
        for state in (slim.before, slim.state_dict)
    ]
    print(
        f'{out}: {len(slim.state_dict)} of {len(slim.before)} tensors, '
        f'{after / 1e6:.3f} of {before / 1e6:.3f} M values; '
        'outputs differ by 0'
    )
    for name, stages in slim.blocks.items():
        print(f'{out_config}: blocks with attention in {name}: {stages}')


if __name__ == '__main__':
    main()
