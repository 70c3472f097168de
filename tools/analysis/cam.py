"""Show which parts of an image count for the features of residual blocks.

Score-CAM: each channel of a block's output masks the image; the better the
network still recognises the masked image, the more the channel weighs. The
output is taken after the block's layer attention. A classifier is asked about
the class that it predicts, or --target; a detector about its detections. With
--compare, a second network, such as the same one pruned, is asked about the
same, side by side. Below each map stands the KL divergence between the
attention weights of the block and those of the active one before it, on this
image.

Needs pytorch-grad-cam: pip install grad-cam==1.5.5. A block of 2048 channels
takes 2048 forward passes: on a CPU, use small images or --max-channels.

Example:
  python tools/analysis/cam.py my_config.py epoch_1.pth cat.jpg dog.jpg \\
      --layers layer3.4 layer3.5 --compare my_config.py epoch_12.pth
"""

import argparse
from pathlib import Path

from mmengine.config import DictAction
from mmengine.utils import ProgressBar

import mmela  # noqa: F401
from mmela.analysis.inputs import (
    check_device,
    find_images,
    image_batches,
    image_pipeline,
    load_network,
)
from mmela.command_line import one_line


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', help='image, or folder of images'
    )
    parser.add_argument(
        '--layers',
        nargs='+',
        metavar='BLOCK',
        help='residual blocks such as layer1.2 (default: the last block of each stage)',
    )
    parser.add_argument(
        '--compare',
        nargs=2,
        metavar=('CONFIG', 'CHECKPOINT'),
        help='another network, shown beside the first',
    )
    parser.add_argument(
        '--out',
        default='cam',
        metavar='DIR',
        help='folder for the pictures (default: %(default)s)',
    )
    parser.add_argument(
        '--target',
        type=int,
        metavar='N',
        help='class that a classifier is asked about (default: the one that '
        'the first network predicts)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='least score of the detections that a detector is asked about '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--max-channels',
        type=int,
        metavar='N',
        help='use only the N channels that vary most (default: all)',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        default=16,
        help='masked images run at a time (default: %(default)s)',
    )
    parser.add_argument(
        '--device', help='such as cpu or cuda:0 (default: an accelerator, if any)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='change settings of the configs',
    )
    return parser.parse_args(argv)


def explain(args: argparse.Namespace) -> None:
    """Draw the maps of all images."""
    from mmela.analysis import cam

    for name in ('max_channels', 'batch_size'):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = '--' + name.replace('_', '-')
            raise ValueError(f'{option}={value} is not positive')
    images = find_images(args.images)
    device = check_device(args.device)
    networks = [(args.config, args.checkpoint)]
    networks += [args.compare] if args.compare else []
    models, names = [], []
    for config, checkpoint in networks:
        cfg, model = load_network(config, checkpoint, args.cfg_options, device)
        if not models:
            pipeline = image_pipeline(cfg)
        models.append(model)
        name = f'{Path(config).stem}\n{Path(checkpoint).name}'
        names.append(f'{name} (2)' if name in names else name)
    if len({cam.is_detector(model) for model in models}) > 1:
        raise ValueError(
            f'{args.config} and {args.compare[0]} are a detector '
            'and a classifier, which answer different questions'
        )
    blocks = args.layers or cam.last_blocks(models[0])
    for model in models:
        for block in blocks:
            cam.target_layer(model, block)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    for index, batch in enumerate(image_batches(pipeline, images)):
        image = images[index]
        try:
            cams = cam.ImageCAM(models, batch, args.target, args.score_thr)
        except ValueError as error:
            raise ValueError(f'{image}: {error}') from error
        counts = [
            cam.channel_count(model, block) for model in models for block in blocks
        ]
        bar = ProgressBar(
            sum(min(count, args.max_channels or count) for count in counts)
        )
        columns, notes = {}, {}
        for number, name in enumerate(names):
            notes[name] = cams.notes(number)
            columns[name] = {
                block: cams.compute(
                    number,
                    block,
                    batch_size=args.batch_size,
                    max_channels=args.max_channels,
                    progress=lambda n, bar=bar: [bar.update() for _ in range(n)],
                )
                for block in blocks
            }
        print()
        path = out / f'{index}_{image.stem}.png'
        cam.draw_cams(
            path, cams.picture(), columns, notes, f'{image.name}: {cams.target}'
        )
        print(path)


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        explain(args)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f'error: {one_line(error)}') from error


if __name__ == '__main__':
    main()
