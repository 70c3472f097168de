import shutil

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmela.engine.data_root import DataRootRunner, set_data_root

TEXT = """
data_root = 'data/here/'
train_dataloader = dict(dataset=dict(
    data_root=data_root, ann_file='annotations/train.json',
    data_prefix=dict(img='train/')))
val_dataloader = dict(dataset=dict(
    data_root=data_root, ann_file='annotations/val.json',
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


def make(folder, *splits):
    (folder / 'annotations').mkdir()
    for split in splits:
        (folder / 'annotations' / f'{split}.json').touch()
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
    cfg.test_evaluator = cfg.val_evaluator
    warnings = set_data_root(cfg)
    assert len(warnings) == 2
    assert roots(cfg) == [f'{root}/'] * 3
    assert f'no {root}/annotations/val.json: the val metrics' in warnings[0]
    for split in ('val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.ann_file == 'annotations/train.json'
        assert dataset.data_prefix == dict(img='train/')
        assert cfg[f'{split}_evaluator'].ann_file == f'{root}/annotations/train.json'


@pytest.mark.parametrize('splits', [(), ('val',), ('train', 'val')])
def test_no_substitute_where_none_is_due(cfg, tmp_path, splits):
    cfg.data_root = make(tmp_path, *splits)
    assert set_data_root(cfg) == []
    assert cfg.val_dataloader.dataset.ann_file == 'annotations/val.json'


def test_needs_a_file_and_a_data_root(cfg):
    with pytest.raises(ValueError, match='read from a file'):
        set_data_root(Config(dict(data_root='x')))
    cfg.data_root = None
    with pytest.raises(ValueError, match='has a data_root'):
        set_data_root(cfg)


def test_runner(tmp_path, config_dir, shapes):
    """The demo config, built as the toolboxes' tools build it."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    root = tmp_path / 'data'
    shutil.copytree(shapes, root)
    (root / 'annotations' / 'instances_val2017.json').unlink()
    cfg = Config.fromfile(
        config_dir / 'demo' / 'faster-rcnn_r50-narrow_ela_fpn_shapes.py'
    )
    cfg.merge_from_dict(dict(data_root=str(root)))
    cfg.work_dir = str(tmp_path / 'work')
    runner = RUNNERS.build(cfg)
    assert isinstance(runner, DataRootRunner)
    assert roots(runner.cfg) == [f'{root}/'] * 3
    loader = runner.build_dataloader(runner.cfg.val_dataloader)
    assert len(loader.dataset) == 6
    (log,) = (tmp_path / 'work').rglob('*.log')
    assert 'metrics are of the training images' in log.read_text()
    assert roots(cfg) == ['data/shapes/'] * 3  # the caller's stays as it is
