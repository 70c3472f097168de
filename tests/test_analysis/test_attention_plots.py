"""Pictures of measurements: which, and that they can be drawn."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mmela.analysis.attention_plots import attention_pictures, heads_plot, map_plot
from mmela.visualization.drawing import LIGHT, draw
from tests.helpers.measurements import SMALL, measurement, stage


def names(result):
    return [p.name for p in attention_pictures(result)]


def test_pictures_that_apply(tmp_path):
    pictures = list(attention_pictures(measurement(SMALL)))
    assert [p.name for p in pictures] == [
        'maps_layer1',
        'heads_layer1',
        'maps_layer2',
        'kl',
        'policy',
        'features',
        'queries',
    ]
    assert [p.name for p in pictures if p.detail] == ['heads_layer1']
    for picture in pictures:
        assert picture.title and picture.caption.endswith('.')
        for path in draw(picture.plot, tmp_path / f'{picture.name}.png'):
            with Image.open(path) as image:
                assert np.asarray(image.convert('L')).std() > 3
            assert path.stat().st_size < 200_000
    pyplot = sys.modules.get('matplotlib.pyplot')
    assert pyplot is None or not pyplot.get_fignums()


def test_without_distribution(tmp_path):
    light = stage(['active'] * 3, maps=None, prunable=False)
    light['contributions'] = dict(
        blocks=[0, 1, 2], mean=[0.1, 0.4, 1], std=[0.1, 0.2, 0], previous='output'
    )
    result = dict(measurement({'backbone.layer1': light}), decision=None)
    assert names(result) == ['features', 'queries', 'contributions']
    picture = list(attention_pictures(result))[-1]
    draw(picture.plot, tmp_path / 'contributions.png')


def scores(blocks, heads, before):
    rows = [[1 / (i + 2)] * (i + 1) + [None] * (blocks - i - 1) for i in range(blocks)]
    rest = [before / (i + 2) for i in range(blocks)]
    return dict(
        temperatures=[0.7 + 0.1 * i for i in range(heads)],
        limited=[0.0] * (heads - 1) + [0.25],
        mean=rows,
        heads=[rows] * heads,
        before=dict(mean=rest, heads=[rest] * heads),
    )


@pytest.mark.parametrize('heads, before', [(1, 0), (2, 1), (5, 1)])
def test_scores_of_heads(tmp_path, heads, before):
    kcla = stage(['active'] * 3, maps=None, scores=scores(3, heads, before))
    result = dict(measurement({'backbone.layer1': kcla}), decision=None)
    assert names(result)[0] == 'scores_layer1'
    figure = Figure()
    next(attention_pictures(result)).plot(figure, LIGHT)
    maps = [a for a in figure.axes if a.images]
    assert len(maps) == min(heads, 3)
    assert maps[0].get_title().startswith('head 0, s = 0.70')
    assert (
        maps[-1].get_title().endswith(f's = {0.6 + 0.1 * heads:.2f}, 25% at the limit')
    )
    labels = [t.get_text() for t in maps[0].get_xticklabels()]
    assert labels == ['before'] * before + ['0', '1', '2']
    shown = maps[0].images[0].get_array()
    assert shown.count() == 6 + 3 * before
    draw(next(attention_pictures(result)).plot, tmp_path / 'x.png')


@pytest.mark.parametrize('low, stages', [(0.2, 1), (-0.2, 3), (0.2, 4)])
def test_keys(tmp_path, low, stages):
    keys = dict(blocks=[0, 2], mean=[[1, low], [low, 1]], overall=low)
    result = measurement(
        {f'layer{i}': stage(['active'] * 3, keys=keys) for i in range(stages)}
    )
    picture = [p for p in attention_pictures(result) if p.name == 'keys'][0]
    figure = Figure()
    picture.plot(figure, LIGHT)
    maps = [a for a in figure.axes if a.images]
    assert [a.get_title() for a in maps] == [
        f'layer{i}: {low:.2f}' for i in range(stages)
    ]
    assert maps[0].images[0].get_clim() == (0 if low > 0 else -1, 1)
    assert [t.get_text() for t in maps[0].get_xticklabels()] == ['0', '2']
    draw(picture.plot, tmp_path / 'x.png')


def test_little_to_show():
    gone = stage(['pruned'] * 2, maps=None, queries=None)
    result = dict(measurement({'layer1': gone}), histogram=None)
    assert names(result) == ['features']


def text(figure):
    return [
        t.get_text()
        for a in figure.axes
        for t in [*a.texts, *a.get_xticklabels(), *a.get_yticklabels()]
    ]


def test_map_marks_what_is_pruned():
    figure = Figure()
    map_plot(SMALL['backbone.layer1'])(figure, LIGHT)
    axes = figure.axes[0]
    assert text(figure)[:7] == ['1.00', '0.50', '0.50'] + ['0.33'] * 3 + ['0']
    assert text(figure).count('✕ 1') == 2
    # The row of the pruned block up to it, its column from it on
    boxes = [tuple(p.get_bbox().bounds) for p in axes.patches]
    assert boxes == [(-0.5, 0.5, 1, 1), (0.5, 0.5, 1, 3)]
    # Whose key and value stay has no column, but a longer row.
    figure = Figure()
    map_plot(SMALL['backbone.layer2'])(figure, LIGHT)
    boxes = [tuple(p.get_bbox().bounds) for p in figure.axes[0].patches]
    assert boxes == [(-0.5, 0.5, 2, 1)]


@pytest.mark.parametrize('heads', [1, 5, 64])
def test_many_heads_and_blocks(tmp_path, heads):
    states = ['active', 'pruned', 'active'] * 8
    drawn = stage(states[:23], heads=heads)
    figure = Figure()
    heads_plot(drawn)(figure, LIGHT)
    labels = [t.get_text() for t in figure.axes[0].texts]
    assert labels == [str(i) for i in range(heads)]
    weights, gone = (x.get_array() for x in figure.axes[0].images)
    shown = sum(v is not None for row in drawn['maps']['mean'] for v in row)
    assert weights.count() == heads * shown
    assert gone.count() == heads * (23 * 24 // 2 - shown)
    if heads == 64:
        for plot in (heads_plot(drawn), map_plot(drawn)):
            path = draw(plot, tmp_path / 'deep.png')[0]
            assert path.stat().st_size < 400_000
