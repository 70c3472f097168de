"""Measure the layer attentions of a checkpoint, in pictures and numbers.

It runs images through the backbone and writes, where applicable: attention maps
of each stage; the KL divergence between adjacent attentions and the decision of
the config's pruning policy; the similarity of features and of queries between
adjacent blocks; and for MRLA-light, the contribution of each layer to the last
output. layer_attention.json has all numbers. The network may be pruned or not.

Without --out, the files go to layer_attention/NAME/ beside the checkpoint
NAME.pth, where mmela report reads them.

Example:
  mmela layer-attention my_config.py \\
      work_dirs/my_config/epoch_12.pth --num-images 200
"""

import argparse
from pathlib import Path

from mmela_light.arguments import add_cfg_options, tool_parser


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('layer-attention', __doc__)
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument(
        '--data',
        nargs='+',
        metavar='DIR_OR_IMAGE',
        help='images to run, with the test pipeline of the config '
        '(default: the validation data of the config)',
    )
    parser.add_argument(
        '--num-images',
        type=int,
        default=100,
        metavar='N',
        help='number of images, evenly spaced in the data (default: %(default)s)',
    )
    parser.add_argument('--out', metavar='DIR', help='folder for pictures and numbers')
    parser.add_argument(
        '--device', help='such as cpu or cuda:0 (default: an accelerator, if any)'
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


def progress(batches, images: int):
    """Yield batches and show the progress."""
    from mmengine.utils import ProgressBar

    bar = ProgressBar(images)
    for batch in batches:
        yield batch
        for _ in range(len(batch['inputs'])):
            bar.update()
    print()


def analyse(args: argparse.Namespace) -> Path:
    """Measure the attentions, and write pictures and numbers; returns the folder."""
    from ..analysis.attention import (
        hook_settings,
        measure_attention,
        save_measurement,
    )
    from ..analysis.attention_plots import attention_pictures
    from ..analysis.inputs import (
        check_device,
        evenly,
        find_images,
        image_batches,
        image_pipeline,
        load_network,
        validation_loader,
    )
    from ..engine.tables import decision_table
    from ..pruning import PruningDecision
    from ..structure import attention_stages
    from ..visualization.drawing import draw

    if args.num_images < 1:
        raise ValueError(f'--num-images={args.num_images} is not positive')
    files = find_images(args.data) if args.data else None
    device = check_device(args.device)
    cfg, model = load_network(args.config, args.checkpoint, args.cfg_options, device)
    if not attention_stages(model):
        raise ValueError(f'{args.config} has no layer attention')
    if files:
        files = [files[i] for i in evenly(len(files), args.num_images)]
        batches = image_batches(image_pipeline(cfg), files)
        count = len(files)
    else:
        batches = validation_loader(cfg, args.num_images)
        count = len(batches.dataset)
    settings = hook_settings(cfg)
    source = settings.pop('source')
    result = measure_attention(model, progress(batches, count), **settings)

    checkpoint = Path(args.checkpoint)
    out = (
        Path(args.out)
        if args.out
        else checkpoint.parent / 'layer_attention' / checkpoint.stem
    )
    result = save_measurement(
        out, args.config, checkpoint, 'images' if files else 'validation data', result
    )
    if result['decision']:
        layers = PruningDecision.from_dict(result['decision']).layers
        active = sum(s['states'].count('active') for s in result['stages'].values())
        print(
            f'{active} of {len(layers)} attentions are active. The policy ({source}) '
            'would now decide:'
        )
        print(decision_table(layers))
    pictures = list(attention_pictures(result))
    for picture in pictures:
        draw(picture.plot, out / f'{picture.name}.png')
    for note in result['left_out']:
        print(f'Left out: {note}.')
    print(
        f'Measured {count} images. {out} has {len(pictures)} pictures, each also for '
        'dark pages, and layer_attention.json'
    )
    return out


def main(argv=None) -> None:
    args = parse_args(argv)
    from ..command_line import one_line_errors

    with one_line_errors(OSError, ValueError, KeyError):
        analyse(args)
