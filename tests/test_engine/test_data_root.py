import json
import shutil

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, RUNNERS

from mmela.engine.data_root import DataRootRunner, set_data_root

TEXT = """
data_root = 'data/here/'
model = dict(head=[dict(num_classes=2), dict(num_classes=1)], num_classes=2)
train_dataloader = dict(dataset=dict(
    type='ThreeDataset', data_root=data_root, ann_file='annotations/train.json',
    metainfo=dict(classes=('cat', 'dog')), data_prefix=dict(img='train/')))
val_dataloader = dict(dataset=dict(
    type='ThreeDataset', data_root=data_root, ann_file='annotations/val.json',
    data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = [dict(ann_file=data_root + 'annotations/val.json'),
                  dict(ann_file='data/here_too/val.json')]
load_from = 'data/here/checkpoint.pth'
"""
SPLITS = ('train', 'val', 'test')


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / 'config.py').write_text(TEXT)
    return Config.fromfile(tmp_path / 'config.py')


def roots(cfg):
    return [cfg[f'{s}_dataloader'].dataset.data_root for s in SPLITS]


@DATASETS.register_module()
class ThreeDataset:
    METAINFO = dict(classes=('cat', 'dog', 'cow'))


def content(names=('cat', 'dog'), images=1, objects=1, **kwargs):
    """Annotations in COCO layout."""
    return dict(
        categories=[dict(id=7 + i, name=name) for i, name in enumerate(names)],
        images=[dict(id=i) for i in range(images)],
        annotations=[dict(category_id=7, image_id=0)] * objects,
        **kwargs,
    )


def make(folder, *splits, **texts):
    """Annotation files: usual ones of ``splits``, and given ones."""
    (folder / 'annotations').mkdir()
    for split, text in {**dict.fromkeys(splits, content()), **texts}.items():
        if not isinstance(text, str):
            text = json.dumps(text)
        (folder / 'annotations' / f'{split}.json').write_text(text)
    return str(folder)


@pytest.mark.parametrize('new', ['other/place', 'other/place/'])
def test_everything_follows(cfg, new):
    cfg.merge_from_dict(dict(data_root=new))
    assert set_data_root(cfg) == []
    assert roots(cfg) == ['other/place/'] * 3
    val = 'other/place/annotations/val.json'
    assert cfg.val_evaluator.ann_file == val
    assert cfg.test_evaluator[0].ann_file == val
    # Only data sets and evaluators, and only paths in the old place
    assert cfg.test_evaluator[1].ann_file == 'data/here_too/val.json'
    assert cfg.load_from == 'data/here/checkpoint.pth'
    assert cfg.val_dataloader.dataset.data_prefix.img == 'val/'


def test_without_an_option_nothing_changes(cfg):
    before = cfg.to_dict()
    assert set_data_root(cfg) == []
    assert cfg.to_dict() == before


def test_a_more_specific_option_wins(cfg):
    cfg.merge_from_dict(
        {'data_root': 'other', 'val_dataloader.dataset.data_root': 'val_place/'}
    )
    set_data_root(cfg)
    assert roots(cfg) == ['other/', 'val_place/', 'other/']


def test_training_images_for_lacking_validation_images(cfg, tmp_path):
    root = make(tmp_path, 'train')
    cfg.data_root = root
    warnings = set_data_root(cfg)
    assert len(warnings) == 2
    assert roots(cfg) == [f'{root}/'] * 3
    assert f'no {root}/annotations/val.json, so the val metrics' in warnings[0]
    for split in ('val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.ann_file == 'annotations/train.json'
        assert dataset.data_prefix == dict(img='train/')
    used = f'{root}/annotations/train.json'
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator[0].ann_file == used
    assert cfg.test_evaluator[1].ann_file == 'data/here_too/val.json'


@pytest.mark.parametrize('splits', [(), ('val',), ('train', 'val')])
def test_no_substitute_where_none_is_due(cfg, tmp_path, splits):
    cfg.data_root = make(tmp_path, *splits)
    assert set_data_root(cfg) == []
    assert cfg.val_dataloader.dataset.ann_file == 'annotations/val.json'


def test_own_categories(cfg, tmp_path):
    """Data sets take them, in the order of the file, and heads their number."""
    own = content(('bolt', 'nut', 'washer'))
    cfg.data_root = make(tmp_path, train=own, val=own)
    (message,) = set_data_root(cfg)
    assert message.endswith('train.json: bolt, nut, washer.')
    for split in SPLITS:
        classes = cfg[f'{split}_dataloader'].dataset.metainfo.classes
        assert tuple(classes) == ('bolt', 'nut', 'washer')
    assert cfg.model.num_classes == cfg.model.head[0].num_classes == 3
    assert cfg.model.head[1].num_classes == 1


def test_categories_of_the_data_set(cfg, tmp_path):
    """Without classes in the config they are the class's own."""
    del cfg.train_dataloader.dataset['metainfo']
    cfg.model.num_classes = 3
    cfg.data_root = make(tmp_path, train=content(('cat', 'dog', 'cow')))
    assert 'classes' not in ' '.join(set_data_root(cfg))
    assert cfg.model.num_classes == 3 and cfg.model.head[0].num_classes == 2


@pytest.mark.parametrize(
    'texts, match',
    [
        (dict(train=''), 'train.json is not a COCO annotation file'),
        (dict(train='{"images": [1, '), 'train.json is not a COCO annotation file'),
        (dict(train='[]'), 'train.json is not a COCO annotation file'),
        (dict(train=dict(images=[])), "it has no 'categories'"),
        (dict(train=content(), val=''), 'val.json is not a COCO annotation file'),
        (dict(train=content(images=0)), 'train.json has no image'),
        (dict(train=content(objects=0)), 'train.json has no object'),
        (
            dict(train=dict(content(), annotations=[dict(category_id=1)])),
            'train.json has no object',
        ),
        (dict(train=content(('cat', 'cat'))), 'categories with the same name'),
        (
            dict(train=content(), val=content(('dog', 'cat'))),
            'val.json has the categories dog, cat, but .*train.json has cat, dog',
        ),
    ],
)
def test_what_nothing_can_be_trained_on(cfg, tmp_path, texts, match):
    """One clear line before training."""
    cfg.data_root = make(tmp_path, **texts)
    with pytest.raises(ValueError, match=match) as error:
        set_data_root(cfg)
    assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


def test_no_head_to_size(cfg, tmp_path):
    cfg.model = dict(num_classes=5)
    cfg.data_root = make(tmp_path, train=content(('bolt',)))
    with pytest.raises(ValueError, match='1 categories .* no num_classes=2'):
        set_data_root(cfg)


def test_needs_a_file_and_a_data_root(cfg):
    with pytest.raises(ValueError, match='read from a file'):
        set_data_root(Config(dict(data_root='x')))
    cfg.data_root = None
    with pytest.raises(ValueError, match='has a data_root'):
        set_data_root(cfg)


@pytest.fixture
def demo(config_dir):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    return Config.fromfile(
        config_dir / 'demo' / 'faster-rcnn_r50-narrow_ela_fpn_shapes.py'
    )


def test_runner(tmp_path, demo, shapes):
    """The demo config, built as the toolboxes' tools build it."""
    root = tmp_path / 'data'
    shutil.copytree(shapes, root)
    (root / 'annotations' / 'instances_val2017.json').unlink()
    demo.merge_from_dict(dict(data_root=str(root)))
    demo.work_dir = str(tmp_path / 'work')
    runner = RUNNERS.build(demo)
    assert isinstance(runner, DataRootRunner)
    assert roots(runner.cfg) == [f'{root}/'] * 3
    loader = runner.build_dataloader(runner.cfg.val_dataloader)
    assert len(loader.dataset) == 6
    (log,) = (tmp_path / 'work').rglob('*.log')
    assert 'metrics use the training images' in log.read_text()
    assert 'The classes come' not in log.read_text()  # those of COCO
    assert roots(demo) == ['data/shapes/'] * 3  # the caller's stays as it is


def test_runner_with_own_categories(tmp_path, demo, shapes):
    """All objects are found, and each keeps its class."""
    root = tmp_path / 'data'
    shutil.copytree(shapes, root)
    names, count = {}, 0
    for path in sorted((root / 'annotations').iterdir(), reverse=True):  # val, train
        text = json.loads(path.read_text())
        used = {a['category_id'] for a in text['annotations']}
        names.update({i: f'shape {i}' for i in used})
    for path in (root / 'annotations').iterdir():
        text = json.loads(path.read_text())
        text['categories'] = [dict(id=i, name=n) for i, n in sorted(names.items())]
        path.write_text(json.dumps(text))
        if 'train' in path.name:
            count = sum(not a['iscrowd'] for a in text['annotations'])
    demo.merge_from_dict(dict(data_root=str(root)))
    demo.work_dir = str(tmp_path / 'work')
    runner = RUNNERS.build(demo)
    classes = tuple(name for _, name in sorted(names.items()))
    dataset = runner.build_dataloader(runner.cfg.train_dataloader).dataset
    assert dataset.metainfo['classes'] == classes
    labels = [
        x['bbox_label']
        for i in range(len(dataset))
        for x in dataset.get_data_info(i)['instances']
        if not x['ignore_flag']
    ]
    assert len(labels) == count and max(labels) < len(classes)
    assert runner.model.roi_head.bbox_head.num_classes == len(classes)
    assert runner.model.rpn_head.num_classes == 1
