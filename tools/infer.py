"""Detect objects in images, videos and camera frames, or classify them.

It writes every input with its predictions to a new folder, and
predictions.json, a COCO data set whose annotations have a score. It uses the
inferencers of mmdet and mmpretrain. A pruned checkpoint needs no further option.

Examples:
  mmela infer work_dirs/ela/my_config.py work_dirs/ela/epoch_12.pth \\
      street.jpg photos/ 'more/**/*.png' clip.mp4 --out found
  mmela infer my_config.py epoch_12.pth camera:0 --out seen \\
      --frames 300
"""

import argparse

from mmela_light.arguments import tool_parser


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('infer', __doc__)
    parser.add_argument('config', help='config of a detector or a classifier')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help='image, folder of images, pattern in quotes, video, or camera:N',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to write')
    parser.add_argument(
        '--batch-size', type=int, default=1, metavar='N', help='default: %(default)s'
    )
    parser.add_argument(
        '--device',
        nargs='+',
        metavar='NAME',
        help='devices that share the images, such as cpu, or cuda:0 cuda:1 (default: '
        'an accelerator if there is one)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='SCORE',
        help='minimum score of boxes to draw; predictions.json has all boxes (default: '
        '%(default)s)',
    )
    parser.add_argument(
        '--no-pictures', action='store_true', help='write only predictions.json'
    )
    parser.add_argument(
        '--annotations',
        metavar='FILE',
        help='COCO annotation file; predictions.json takes the ids of images and '
        'categories from it, so that you can evaluate with it',
    )
    parser.add_argument(
        '--frames',
        type=int,
        metavar='N',
        help='maximum number of frames of each video or camera (default: all)',
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='load a checkpoint even if it lacks most keys of the network',
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    from mmela.command_line import one_line_errors
    from mmela.convert.networks import NETWORK_ERRORS
    from mmela.inference import infer

    with one_line_errors(*NETWORK_ERRORS):
        path = infer(
            args.config,
            args.checkpoint,
            args.inputs,
            args.out,
            batch_size=args.batch_size,
            devices=args.device,
            score_thr=args.score_thr,
            pictures=not args.no_pictures,
            annotations=args.annotations,
            frames=args.frames,
            force=args.force,
        )
    print(path)


if __name__ == '__main__':
    main()
