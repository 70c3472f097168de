"""Count the cost of networks: parameters, FLOPs and memory for training.

A network is a config, or the work directory of a run. With --over, the tool
counts each network at several image sizes, or with several values of a setting,
and plots the costs; --minus subtracts the cost of a plain network. For runs, it
plots their accuracy against their cost.

FLOPs are multiply-adds for one image, including elementwise products and
self-attention (the model zoo leaves these out). Memory is what a training step
keeps for the backward pass of one image. Both are counted, not measured.

Examples:
  mmela cost my_config.py \\
      mmpretrain::resnet/resnet50_8xb32_in1k.py
  mmela cost ceit-tiny-mrla-light.py --minus ceit-tiny.py \\
      --over size 160 224 288 384
  mmela cost resnet-kcla.py resnet-mrla-base.py \\
      --minus resnet.py --over model.backbone.depth 20 56 110
  mmela cost work_dirs/kcla work_dirs/mrla-light
"""

import argparse
import ast
import copy
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from mmela_light.arguments import add_cfg_options, tool_parser

if TYPE_CHECKING:
    from mmengine.config import Config

    from ..analysis.work_dir import Run
    from ..visualization.drawing import Plot

SIZE = 'size'


def parse_args(argv=None) -> argparse.Namespace:
    parser = tool_parser('cost', __doc__)
    parser.add_argument(
        'networks',
        nargs='+',
        metavar='NETWORK',
        help='config, or work directory of a run',
    )
    parser.add_argument(
        '--over',
        nargs='+',
        metavar=('KEY', 'VALUE'),
        help='"size" followed by image sizes N or HxW, or a setting of the configs '
        'followed by its values',
    )
    parser.add_argument(
        '--minus',
        metavar='NETWORK',
        help='network whose cost to subtract, at the same value of --over',
    )
    parser.add_argument(
        '--labels',
        nargs='+',
        metavar='NAME',
        help='names of the networks; runs with the same name are combined (default: '
        'names of the configs)',
    )
    parser.add_argument(
        '--metric', help='validation metric of the runs (default: the first one)'
    )
    parser.add_argument(
        '--out',
        default='cost',
        metavar='DIR',
        help='folder for the table and the pictures (default: %(default)s)',
    )
    add_cfg_options(parser, 'change settings of the configs')
    return parser.parse_args(argv)


def parse_size(text: str) -> Tuple[int, int]:
    """Parse height and width from N or HxW."""
    parts = text.lower().split('x')
    if len(parts) > 2 or not all(p.isdigit() and int(p) for p in parts):
        raise ValueError(
            f'--over size {text}: {text!r} is not a size; give N, such as 224, or HxW'
        )
    return int(parts[0]), int(parts[-1])


def steps(over: Optional[List[str]]) -> List[Tuple[str, Any]]:
    """Parse --over: the text on the axis and the value, for each step."""
    if over is None:
        return [('', None)]
    key, *texts = over
    if not texts:
        raise ValueError(f'--over {key} needs values')
    if len(set(texts)) < len(texts):
        raise ValueError(f'--over {" ".join(over)} has a value twice')
    if key == SIZE:
        return [(text, parse_size(text)) for text in texts]
    values = []
    for text in texts:
        try:
            values.append((text, ast.literal_eval(text)))
        except (SyntaxError, ValueError):
            values.append((text, text))
    return values


def read(network: str) -> Tuple['Config', str, Optional['Run']]:
    """Read the config of a network, its name, and the run if it is a work directory."""
    from mmengine.config import Config

    from ..analysis.work_dir import Run
    from ..command_line import find_config, one_line

    run = Run(network) if Path(network).is_dir() else None
    if run is not None and not run.config_name:
        raise ValueError(f'{network} has no dumped config')
    path = find_config(network) if run is None else run.work_dir / run.config_name
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is code and may raise anything
        raise ValueError(f'{network} cannot be read: {one_line(error)}') from error
    if not isinstance(cfg.get('model'), dict):
        raise ValueError(f'{network} has no model')
    return cfg, path.stem, run


def changed(cfg: 'Config', options: Dict[str, Any]) -> 'Config':
    """Copy a config with changed settings.

    Raises:
        ValueError: If the config has no place for a setting.
    """
    for key in options:
        place: Any = cfg
        for part in key.split('.')[:-1]:
            try:
                place = place[int(part) if isinstance(place, list) else part]
            except (IndexError, KeyError, TypeError, ValueError):
                raise ValueError(
                    f'{key}: {Path(cfg.filename).name} has no {part} there'
                ) from None
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(options)
    return cfg


def cost(cfg: 'Config', size: Tuple[int, int]) -> Dict[str, float]:
    """Count the cost of a config's model."""
    from mmengine.registry import MODELS

    from ..analysis.complexity import (
        ForImages,
        count_flops,
        kept_memory,
        used_parameters,
    )

    rpn = (cfg.model.get('test_cfg') or {}).get('rpn')
    if rpn:  # the same number of proposals in every network, whatever its weights
        rpn.nms = dict(type='nms', iou_threshold=1.0)
    with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        model = ForImages(registry.build(cfg.model))
        model.eval()
        return dict(
            parameters=used_parameters(model),
            flops=count_flops(model, size, products=True),
            memory=kept_memory(model, size),
        )


def count_all(args: argparse.Namespace) -> List[dict]:
    """Count every network at every step.

    Returns:
        list[dict]: Rows of the table, one for each network and step of --over.
    """
    from mmengine.utils import ProgressBar

    from ..analysis.complexity import input_size
    from ..command_line import one_line

    key = args.over[0] if args.over else None
    labels = args.labels or []
    if labels and len(labels) != len(args.networks):
        raise ValueError(
            f'--labels has {len(labels)} names for {len(args.networks)} networks'
        )
    networks = [(*read(network), network) for network in args.networks]
    minus = read(args.minus) if args.minus else None
    todo = steps(args.over)
    bar = ProgressBar((len(networks) + bool(minus)) * len(todo), file=sys.stderr)
    known: Dict[Tuple[str, str], Dict[str, float]] = {}

    def counted(cfg: 'Config', tick: str, value: Any) -> Tuple[Tuple[int, int], dict]:
        options = dict(args.cfg_options)
        if key not in (None, SIZE):
            options[key] = value
        cfg = changed(cfg, options)
        size = value if key == SIZE else input_size(cfg)
        # Runs that differ only in their seed cost the same
        name = (str(cfg.model), str(size))
        if name not in known:
            try:
                known[name] = cost(cfg, size)
            except Exception as error:  # a user's network may raise anything
                place = f' with {key} {tick}' if key else ''
                raise ValueError(
                    f'{Path(cfg.filename).name}{place} cannot be counted: '
                    f'{one_line(error)}'
                ) from error
        bar.update()
        return size, known[name]

    plain = (
        {tick: counted(minus[0], tick, value) for tick, value in todo} if minus else {}
    )
    rows = []
    for index, (cfg, name, run, path) in enumerate(networks):
        for tick, value in todo:
            size, costs = counted(cfg, tick, value)
            if plain:
                costs = {k: v - plain[tick][1][k] for k, v in costs.items()}
            row = dict(
                network=labels[index] if labels else name,
                path=path,
                minus=minus[1] if minus else '',
                height=size[0],
                width=size[1],
            )
            if key not in (None, SIZE):
                row[key] = tick
            row.update(costs)
            metric = args.metric or next(iter(run.metric_names if run else ()), None)
            values = (
                [m[metric] for m in run.metrics.values() if metric in m] if run else []
            )
            row.update(
                metric=metric if values else '', score=values[-1] if values else ''
            )
            rows.append(row)
    print(file=sys.stderr)
    return rows


def pictures(rows: List[dict], args: argparse.Namespace) -> Dict[str, 'Plot']:
    """Make the plots for the rows, by name."""
    from ..analysis.cost_plots import QUANTITIES, growth_plot, trade_off_plot

    less = rows[0]['minus']
    plots = {}
    if args.over:
        key = args.over[0]
        by_size = key == SIZE
        numeric = by_size or all(
            isinstance(v, (int, float)) for _, v in steps(args.over)
        )
        points = []
        for index, row in enumerate(rows):
            place = index % len(args.over[1:])
            tick, value = steps(args.over)[place]
            if by_size:
                value = row['height'] * row['width']
            points.append(dict(row, tick=tick, value=value if numeric else place))
        label = 'image size (the axis is linear in the pixels)' if by_size else key
        for quantity in QUANTITIES:
            if len({row[quantity] for row in rows}) > len(args.networks):
                plots[quantity] = growth_plot(points, quantity, label, less)
    elif all(row['metric'] for row in rows):
        networks: Dict[str, dict] = {}
        for row in rows:
            known = networks.setdefault(row['network'], dict(row, scores=[]))
            known['scores'].append(row['score'])
        plots['trade_off'] = trade_off_plot(networks, rows[0]['metric'])
    return plots


def main(argv=None) -> None:
    args = parse_args(argv)
    from ..command_line import one_line_errors
    from ..files import replacing
    from ..visualization.drawing import draw

    out = Path(args.out)
    with one_line_errors(ImportError, OSError, ValueError, KeyError):
        rows = count_all(args)
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / 'cost.csv') as temporary:
            with open(temporary, 'w', encoding='utf-8', newline='') as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        for name, plot in pictures(rows, args).items():
            print(draw(plot, out / f'{name}.png')[0])
    print(out / 'cost.csv')
