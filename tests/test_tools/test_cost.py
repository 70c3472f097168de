"""mmela cost: what it counts, by hand, and what it draws."""

import csv
import json
from pathlib import Path

import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image

from mmela.analysis.cost_plots import growth_plot, scale, trade_off_plot
from mmela.tools.cost import main
from mmela.visualization.drawing import LIGHT

pytest.importorskip('mmpretrain')

ROOT = Path(__file__).resolve().parents[2]
CIFAR = ROOT / 'configs' / 'cifar'
# Blocks of a stage of ResNet-20, and channels and pixels by stage
BLOCKS = 2
STAGES = ((64, 32), (128, 16), (256, 8))
KERNELS = {64: 3, 128: 5, 256: 5}


def cost(out, *args):
    main([*map(str, args), '--out', str(out)])
    with open(out / 'cost.csv', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def config(attention=''):
    return CIFAR / f'resnet20{attention}_1xb128_cifar100.py'


def mrla_base(scale, blocks=BLOCKS):
    """Multiply-adds of the attentions: value and norm, sum, query and key, scores."""
    total = 0
    for channels, side in STAGES:
        pixels = (side * scale) ** 2
        for t in range(1, blocks + 1):
            total += (9 + 2 + t) * channels * pixels
            total += 2 * KERNELS[channels] * channels + t * channels
    return total


def test_sizes(tmp_path):
    """What MRLA-base adds at 32 and at 48 x 16 pixels."""
    rows = cost(
        tmp_path,
        config('-mrla-base'),
        '--minus',
        config(),
        '--over',
        'size',
        '32',
        '64',
        '16x64',
    )
    assert [(r['height'], r['width']) for r in rows] == [
        ('32', '32'),
        ('64', '64'),
        ('16', '64'),
    ]
    flops = [float(r['flops']) for r in rows]
    assert flops == [mrla_base(1), mrla_base(2), mrla_base(1)]
    added = sum(
        BLOCKS * (11 * channels + 2 * KERNELS[channels]) for channels, _ in STAGES
    )
    assert {float(r['parameters']) for r in rows} == {added}
    assert {p.name for p in tmp_path.glob('*.png')} == {
        f'{n}{t}.png' for n in ('flops', 'memory') for t in ('', '_dark')
    }
    with Image.open(tmp_path / 'flops.png') as image:
        assert image.width > 400


def test_settings(tmp_path):
    """A deeper network, and the plain one as deep as it."""
    rows = cost(
        tmp_path,
        config('-mrla-base'),
        '--labels',
        'base',
        '--minus',
        config(),
        '--over',
        'model.backbone.depth',
        '20',
        '29',
    )
    assert [r['model.backbone.depth'] for r in rows] == ['20', '29']
    assert {r['network'] for r in rows} == {'base'}
    flops = [float(r['flops']) for r in rows]
    assert flops == [mrla_base(1), mrla_base(1, blocks=3)]


def write_run(path, accuracy, seed):
    log = path / f'2026010{seed}_030405' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    records = [
        dict(loss=1.0, epoch=1, iter=1, step=1),
        {'accuracy/top1': 10.0, 'time': 1.0, 'step': 1},
        dict(loss=1.0, epoch=2, iter=2, step=2),
        {'accuracy/top1': accuracy, 'time': 1.0, 'step': 2},
    ]
    log.write_text('\n'.join(map(json.dumps, records)))
    Config.fromfile(config()).dump(path / 'plain.py')


def test_runs(tmp_path, capsys):
    for seed, accuracy in enumerate((50.0, 53.0)):
        write_run(tmp_path / f'run{seed}', accuracy, seed)
    rows = cost(tmp_path / 'out', tmp_path / 'run0', tmp_path / 'run1')
    assert [(r['network'], r['metric'], r['score']) for r in rows] == [
        ('plain', 'accuracy/top1', '50.0'),
        ('plain', 'accuracy/top1', '53.0'),
    ]
    assert (tmp_path / 'out' / 'trade_off.png').is_file()
    assert 'trade_off.png' in capsys.readouterr().out


def test_trade_off():
    networks = dict(
        a=dict(flops=2e9, memory=2**22, scores=[50.0, 53.0]),
        b=dict(flops=1e9, memory=2**21, scores=[40.0]),
    )
    figure = Figure()
    trade_off_plot(networks, 'accuracy/top1')(figure, LIGHT)
    axes = figure.axes[0]
    assert [tuple(line.get_xydata()[0]) for line in axes.lines] == [(2, 51.5), (1, 40)]
    texts = [t.get_text() for t in axes.get_legend().get_texts()]
    assert texts == ['a, 4 MiB', 'b, 2 MiB']
    discs = [c for c in axes.collections if isinstance(c, PathCollection)]
    areas = [disc.get_sizes()[0] for disc in discs]
    assert areas[0] == 2 * areas[1]


def test_growth():
    rows = [
        dict(network=n, value=v, tick=str(v), flops=v * f)
        for n, f in (('a', 1e6), ('b', 2e6))
        for v in (4, 2)
    ]
    figure = Figure()
    growth_plot(rows, 'flops', 'depth', 'plain')(figure, LIGHT)
    axes = figure.axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[2, 2], [4, 4]],
        [[2, 4], [4, 8]],
    ]
    assert axes.get_ylabel() == 'added multiply-adds (M)'
    assert axes.get_legend().get_title().get_text() == 'added to plain'
    assert scale('memory', [3 * 2**10])[:2] == (2**10, 'KiB')


@pytest.mark.parametrize(
    'args, match',
    [
        (['--over', 'size', '7y'], 'size 7y'),
        (['--over', 'size', '0'], 'size 0'),
        (['--over', 'size'], 'needs values'),
        (['--over', 'size', '32', '32'], 'twice'),
        (['--over', 'modle.backbone.depth', '20'], 'modle'),
        (['--over', 'model.backbone.depth', '21'], 'with model.backbone.depth 21'),
        (['--labels', 'a', 'b'], '2 names for 1 network'),
        (['--minus', 'nowhere.py'], 'nowhere.py'),
    ],
)
def test_errors(tmp_path, args, match):
    with pytest.raises(SystemExit, match=match) as error:
        cost(tmp_path / 'out', config(), *args)
    assert '\n' not in error.value.code
    assert not (tmp_path / 'out').exists()
