"""Detections and classes before the first pruning and at the end."""

import copy
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmela.analysis import make_report, measure_before_after
from mmela.analysis.before_after import (
    choose_boxes,
    choose_images,
    coco_evaluation,
    find_pair,
)
from mmela.analysis.before_after_plots import read_before_after
from mmela.analysis.work_dir import Run
from mmela.structure import layer_attentions, prune
from tests.helpers.networks import classifier
from tests.helpers.pages import Page, check_offline
from tests.helpers.work_dirs import make_work_dir, write_log

TOOL = Path(__file__).resolve().parents[2] / 'tools/analysis/report.py'


def image(*boxes, labels=None, ignored=()):
    labels = labels or [0] * len(boxes)
    return dict(
        instances=[
            dict(bbox=list(box), bbox_label=label, ignore_flag=int(i in ignored))
            for i, (box, label) in enumerate(zip(boxes, labels))
        ]
    )


def found(*boxes, scores, labels=None):
    return dict(
        bboxes=np.array(boxes, dtype=float).reshape(-1, 4),
        scores=np.array(scores, dtype=float),
        labels=np.array(labels or [0] * len(boxes), dtype=int),
    )


def test_precision_by_hand():
    """Of two objects the first is found, then nothing, then the second."""
    infos = [image((0, 0, 10, 10), (20, 0, 40, 10)), image((5, 5, 9, 9), labels=[1])]
    predictions = [
        found(
            (0, 0, 10, 10), (50, 50, 60, 60), (20, 0, 40, 10), scores=[0.9, 0.8, 0.7]
        ),
        found(scores=[]),
    ]
    precision = coco_evaluation(infos, predictions, ['a', 'b', 'c']).eval['precision']
    # Recall 0 to 0.5 at precision 1, up to 1 at 2 of 3; by 101 points
    expected = np.where(np.linspace(0, 1, 101) <= 0.5, 1, 2 / 3)
    assert precision[0, :, 0, 0, -1] == pytest.approx(expected)
    assert (precision[:, :, 1, 0, -1] == 0).all()  # not found
    assert (precision[:, :, 2, 0, -1] == -1).all()  # no object


def test_crowds_are_neither_right_nor_wrong():
    boxes = (0, 0, 10, 10), (20, 0, 40, 10)
    predictions = [found(*boxes, scores=[0.9, 0.8])]
    evaluation = coco_evaluation([image(*boxes, ignored=[1])], predictions, ['a'])
    assert evaluation.eval['precision'][:, :, 0, 0, -1] == pytest.approx(1)


@pytest.mark.parametrize(
    'scores, objects, expected',
    [
        ([0.6, 0.9, 0.2, 0.5], 1, [3, 0, 1]),  # all from 0.5 on
        ([0.3, 0.01, 0.4], 2, [0, 2]),  # as many as there are objects
        ([0.3], 2, [0]),
        ([], 2, []),
        ([0.3], 0, []),
    ],
)
def test_choice_of_boxes(scores, objects, expected):
    assert choose_boxes(np.array(scores), objects).tolist() == expected


def test_choice_of_images():
    small, medium, large = (0, 0, 9, 9), (0, 0, 50, 50), (0, 0, 200, 200)
    infos = [
        image(small),
        image(large, medium, small),
        image(medium, medium),
        image(large, medium, small, small),
        image(large, medium, small, ignored=[0]),
        image(),
    ]
    assert choose_images(infos, 1) == [1]  # of 1, 3 and 4 the first
    assert set(choose_images(infos, 2)) <= {0, 1, 2, 3, 4}
    assert choose_images(infos, 9) == list(range(6))
    assert choose_images(infos, 2) == choose_images(copy.deepcopy(infos), 2)


@pytest.fixture
def work_dir(tmp_path):
    make_work_dir(tmp_path)  # pruned after epochs 1 and 3, iterations 20 and 60
    return tmp_path


def checkpoint(path, iteration=0):
    state = {'weight': torch.zeros(1)}
    torch.save(dict(meta=dict(iter=iteration), state_dict=state), path)
    return path


def test_pair_of_the_kept_network(work_dir):
    kept = checkpoint(work_dir / 'before_pruning.pth', 20)
    pair = find_pair(Run(work_dir))
    assert (pair.before, pair.after) == (kept, work_dir / 'epoch_4.pth')
    assert pair.note == ''


def test_pair_of_what_is_left(work_dir):
    checkpoint(work_dir / 'before_pruning.pth', 19)  # of another run
    pair = find_pair(Run(work_dir))
    assert pair.before is None and 'keep_unpruned' in pair.note
    later = [checkpoint(work_dir / f'epoch_{i}.pth') for i in (1, 2, 3)]
    pair = find_pair(Run(work_dir))
    assert pair.before == later[0]  # pruned once already: epoch 1 ended with that
    assert 'before the first pruning' in pair.note and 'epoch_1.pth' in pair.note


def test_nothing_pruned_and_no_checkpoint(tmp_path):
    write_log(tmp_path, '20260102_030405', [1])
    assert find_pair(Run(tmp_path)) is None
    with pytest.raises(ValueError, match='has no checkpoint'):
        measure_before_after(tmp_path)
    checkpoint(tmp_path / 'epoch_1.pth')
    (tmp_path / 'last_checkpoint').write_text('epoch_1.pth')
    pair = find_pair(Run(tmp_path))
    assert pair.before is None and 'Nothing was pruned' in pair.note


CLASSES = ('ant', 'bee', 'cow', 'dog')


@pytest.fixture
def classified(work_dir):
    """A work directory of a classifier, with images and both checkpoints."""
    pytest.importorskip('mmpretrain')
    random = np.random.default_rng(0)
    for i in range(8):
        path = work_dir / 'images' / CLASSES[i % 4] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    cfg = classifier()
    # Where mmpretrain's own configs have it
    cfg['data_preprocessor'] = cfg['model'].pop('data_preprocessor')
    cfg['val_dataloader'] = dict(
        batch_size=3,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
        dataset=dict(
            type='CustomDataset',
            data_root=str(work_dir / 'images'),
            pipeline=cfg['test_dataloader']['dataset']['pipeline'],
        ),
    )
    Config(cfg).dump(work_dir / 'my_config.py')
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(dict(cfg['model'], data_preprocessor=cfg['data_preprocessor']))
    torch.nn.init.normal_(model.head.fc.weight)
    state = model.state_dict()
    meta = dict(iter=20, epoch=1)
    torch.save(dict(meta=meta, state_dict=state), work_dir / 'before_pruning.pth')
    prune(model, [list(layer_attentions(model))[-1]])
    meta = dict(iter=80, epoch=4)
    torch.save(dict(meta=meta, state_dict=model.state_dict()), work_dir / 'epoch_4.pth')
    return work_dir, model.eval()


def test_classifier(classified):
    work_dir, model = classified
    path = measure_before_after(work_dir)
    result = read_before_after(work_dir)
    assert json.loads(json.dumps(result)) == json.loads(path.read_text())
    assert result['kind'] == 'classes' and result['images'] == 8
    assert result['sides']['before']['active'] == 8
    assert result['sides']['after']['active'] == 7
    # By hand: the images through the preprocessor of the config
    right = []
    for shown in sorted((work_dir / 'images').glob('*/*.png')):
        pixels = np.asarray(Image.open(shown))[..., ::-1].astype(np.float32)
        x = torch.from_numpy((pixels - 127.5) / 50).permute(2, 0, 1)[None]
        scores = model(x, mode='tensor')
        scores = model.head(scores)[0] if isinstance(scores, tuple) else scores[0]
        top = CLASSES[int(scores.argmax())]
        right.append((shown.parent.name, top == shown.parent.name))
    for row in result['sides']['after']['per_class']:
        hits = [hit for name, hit in right if name == CLASSES[row['label']]]
        assert row['value'] == 100 * np.mean(hits) and row['objects'] == 2
    assert result['sides']['after']['mean'] == 100 * np.mean([hit for _, hit in right])
    page = Page(make_report(work_dir))
    check_offline(page)
    assert 'Classes, before and after' in page.text
    assert 'epoch 1, 8 of 8 attentions' in ' '.join(page.text.split())
    rows = [row[:2] for row in page.rows]
    assert ['all', '8'] in rows and ['ant', '2'] in rows
    # Nothing is done twice, but anew with other checkpoints
    written = path.stat().st_mtime_ns
    measure_before_after(work_dir)
    assert path.stat().st_mtime_ns == written
    (work_dir / 'before_pruning.pth').unlink()
    measure_before_after(work_dir)
    assert list(read_before_after(work_dir)['sides']) == ['after']


def test_report_without_data(classified, capsys):
    """The rest of the page is written, and says what is missing."""
    work_dir, _ = classified
    config = work_dir / 'my_config.py'
    config.write_text(config.read_text().replace('/images', '/elsewhere'))
    main = runpy.run_path(str(TOOL))['main']
    main([str(work_dir)])
    assert 'Detections are not measured: ' in capsys.readouterr().err
    assert 'Not measured.' in Page(work_dir / 'report.html').text


@pytest.mark.parametrize(
    'change', [dict(format=9), dict(shown=[dict(picture='../../secret')])]
)
def test_malformed(classified, change):
    work_dir, _ = classified
    path = measure_before_after(work_dir)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(content, **change)))
    with pytest.raises(ValueError, match='before_after'):
        make_report(work_dir)
