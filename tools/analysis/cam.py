"""Show which parts of an image the features of a network use.

Score-CAM masks the image with each channel of a block's output; the better the
network still recognises the masked image, the higher the weight of the channel.
The output includes the block's layer attention. The target of a classifier is its
predicted class, or --target; the targets of a detector are its detections. With
--compare, other networks, for example the same one pruned or without layer
attention, are shown beside it for the same target. The number below each map is the
KL divergence between the attention weights of the block and those of the previous
active one, on this image.

With --query, the tool instead shows the self-attention of one patch in a vision
transformer such as DeiT.

Score-CAM needs pytorch-grad-cam: pip install grad-cam==1.5.5. A block of 2048 channels
needs 2048 forward passes; on a CPU, use small images or --max-channels.

Example:
  mmela cam my_config.py epoch_1.pth cat.jpg dog.jpg \\
      --layers layer3.4 layer3.5 --compare my_config.py epoch_12.pth
  mmela cam deit.py deit.pth cat.jpg --query 0.4 0.5 \\
      --compare deit-mrla-light.py deit-mrla-light.pth
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, Optional, Sequence, Tuple

import numpy as np

from mmela_light.arguments import add_cfg_options, tool_parser

if TYPE_CHECKING:
    from mmengine.dataset import Compose
    from torch import nn

    from mmela.analysis.patch_attention import PatchLook


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('cam', __doc__)
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', help='image, or folder of images'
    )
    parser.add_argument(
        '--layers',
        nargs='+',
        metavar='BLOCK',
        help='residual blocks such as layer1.2, or layers of a transformer such as '
        'layers.11 (default: the last block of each stage)',
    )
    parser.add_argument(
        '--query',
        nargs=2,
        type=float,
        metavar=('X', 'Y'),
        help='show the self-attention of the patch at this position in a transformer '
        'instead; 0.5 0.5 is the centre of the image',
    )
    parser.add_argument(
        '--heads',
        nargs='+',
        type=int,
        metavar='N',
        help='heads to show with --query (default: all)',
    )
    parser.add_argument(
        '--compare',
        nargs=2,
        action='append',
        default=[],
        metavar=('CONFIG', 'CHECKPOINT'),
        help='another network, shown beside the first; may be repeated',
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
        help='target class of a classifier (default: the prediction of the first '
        'network)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='minimum score of the target detections of a detector '
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
        help='number of masked images per batch (default: %(default)s)',
    )
    parser.add_argument(
        '--device', help='such as cpu or cuda:0 (default: an accelerator, if any)'
    )
    add_cfg_options(parser, 'change settings of the configs')
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> Tuple['Compose', Dict[str, 'nn.Module']]:
    """Load the test pipeline, and the networks by the headings of their columns."""
    from mmela.analysis.inputs import check_device, image_pipeline, load_network

    device = check_device(args.device)
    models: Dict[str, 'nn.Module'] = {}
    pipeline = None
    for config, checkpoint in [(args.config, args.checkpoint), *args.compare]:
        cfg, model = load_network(config, checkpoint, args.cfg_options, device)
        pipeline = pipeline or image_pipeline(cfg)
        name = heading = f'{Path(config).stem}\n{Path(checkpoint).name}'
        while heading in models:
            heading = f'{name} ({len(models) + 1})'
        models[heading] = model
    return pipeline, models


def explain(args: argparse.Namespace) -> None:
    """Draw the Score-CAMs of all images."""
    from mmengine.utils import ProgressBar

    from mmela.analysis import cam
    from mmela.analysis.inputs import find_images, image_batches, input_picture
    from mmela.files import replacing
    from mmela.visualization.drawing import draw_over_image

    for name in ('max_channels', 'batch_size'):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = '--' + name.replace('_', '-')
            raise ValueError(f'{option}={value} is not positive')
    images = find_images(args.images)
    pipeline, networks = load(args)
    models = list(networks.values())
    if len({cam.is_detector(model) for model in models}) > 1:
        names = [args.config, *(config for config, _ in args.compare)]
        raise ValueError(
            f'{", ".join(names)} mix detectors and classifiers, which cannot be '
            'compared'
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
        for number, name in enumerate(networks):
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
        draw_over_image(
            path, input_picture(batch), columns, notes, f'{image.name}: {cams.target}'
        )
        arrays = {
            f'{number}/{block}': cam_
            for number, maps in enumerate(columns.values())
            for block, cam_ in maps.items()
        }
        with replacing(path.with_suffix('.npz')) as temporary:
            np.savez_compressed(temporary, **arrays)
        print(path)


def look(args: argparse.Namespace) -> None:
    """Draw the self-attention of the patch at --query for all images."""
    from mmela.analysis.inputs import find_images, image_batches, input_picture
    from mmela.analysis.patch_attention import layer_names, patch_attention
    from mmela.files import write_text
    from mmela.visualization.drawing import draw_over_image

    images = find_images(args.images)
    pipeline, networks = load(args)
    names = [layer_names(model.backbone) for model in networks.values()][0]
    layers = [name.replace('backbone.', '') for name in args.layers or names[-1:]]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for index, batch in enumerate(image_batches(pipeline, images)):
        columns: Dict[str, Dict[str, np.ndarray]] = {}
        notes: Dict[str, Dict[str, str]] = {}
        numbers = []
        for name, model in networks.items():
            columns[name], notes[name] = {}, {}
            looks = patch_attention(model, batch, layers, args.query)
            for layer, head, weights, attended in chosen_heads(looks, args.heads):
                row = f'{layer}, head {head}'
                columns[name][row] = weights / weights.max()
                notes[name][row] = f'largest {weights.max():.2g}'
                numbers.append(
                    dict(
                        network=name.replace('\n', ' '),
                        layer=layer,
                        head=head,
                        patch=attended.patch,
                        weights=weights.tolist(),
                        extra_tokens=float(attended.extra[head]),
                    )
                )
        if len({tuple(maps) for maps in columns.values()}) > 1:
            raise ValueError(
                'the networks have different numbers of heads; choose heads that all '
                'have with --heads'
            )
        picture = input_picture(batch)
        height, width = (n / m for n, m in zip(picture.shape, weights.shape))
        row, column = attended.patch
        path = out / f'{index}_{images[index].stem}_query.png'
        draw_over_image(
            path,
            picture,
            columns,
            notes,
            f'{images[index].name}: self-attention of patch ({row}, {column})',
            (column * width, row * height, width, height),
        )
        write_text(path.with_suffix('.json'), json.dumps(numbers, indent=1))
        print(path)


def chosen_heads(
    looks: Dict[str, 'PatchLook'], heads: Optional[Sequence[int]]
) -> Iterator[Tuple[str, int, np.ndarray, 'PatchLook']]:
    """Iterate over layers and chosen heads, with the weights of the patches."""
    for layer, attended in looks.items():
        count = len(attended.weights)
        for head in range(count) if heads is None else heads:
            if not 0 <= head < count:
                raise ValueError(
                    f'--heads {head}: {layer} has only heads 0 to {count - 1}'
                )
            yield layer, head, attended.weights[head], attended


def main(argv=None) -> None:
    args = parse_args(argv)
    from mmela.command_line import one_line_errors

    with one_line_errors(ImportError, OSError, ValueError, KeyError):
        look(args) if args.query else explain(args)


if __name__ == '__main__':
    main()
