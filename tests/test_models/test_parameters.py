"""Parameters of every config against the papers, and the written figures."""

import ast
import re
import runpy
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parents[2]
ZOO = runpy.run_path(str(ROOT / 'tools' / 'analysis' / 'model_zoo.py'))
PAPERS = ZOO['load_papers']()
read_metafile = lru_cache(maxsize=None)(ZOO['read_metafile'])
ROWS = [(folder, row) for folder, section in PAPERS.items() for row in section['rows']]
NEEDS = dict(
    cifar='mmpretrain',
    imagenet='mmpretrain',
    faster_rcnn='mmdet',
    mask_rcnn='mmdet',
    retinanet='mmdet',
    unet='mmseg',
)


def skip_without(folder, name):
    pytest.importorskip(NEEDS[folder])
    if folder not in ('cifar', 'imagenet') or 'pvtv2' in name:
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    if '_se_' in name:
        pytest.importorskip('mmpretrain')


@pytest.fixture
def uninitialized(monkeypatch):
    """Leave weights as they are: to draw them takes most of the time."""
    for name in (
        'kaiming_uniform_',
        'kaiming_normal_',
        'xavier_uniform_',
        'uniform_',
        'normal_',
        'trunc_normal_',
    ):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.mark.parametrize('folder, row', ROWS, ids=[row['config'] for _, row in ROWS])
def test_parameters(folder, row, uninitialized):
    """Counted anew: as in the metafile, and as in the paper or noted."""
    name = row['config']
    skip_without(folder, name)
    count = ZOO['count_parameters'](folder, ZOO['build'](folder, name))
    written = read_metafile(folder)[name]
    key = ZOO['parameters_key'](folder)
    assert written[key] == pytest.approx(count, abs=6e-4)
    assert ZOO['parameters_agree'](row, count) == ('note' not in row)


# The papers' tables: parameters in millions with the printed decimals
METHOD = {
    'resnet20_1xb128_cifar100': '0.24',
    'resnet56_1xb128_cifar100': '0.61',
    'resnet110_1xb128_cifar100': '1.17',
    'resnet20-mrla-light_1xb128_cifar100': '0.25',
    'resnet20-kcla_1xb128_cifar100': '0.26',
    'resnet56-kcla_1xb128_cifar100': '0.65',
    'resnet110-kcla_1xb128_cifar100': '1.24',
    'resnet50_8xb32_in1k': '25.6',
    'resnet50-mrla-base_8xb32_in1k': '25.7',
    'resnet50-mrla-light_8xb32_in1k': '25.7',
    'resnet50-ela_8xb32_in1k': '25.7',
    'resnet101_8xb32_in1k': '44.5',
    'resnet101-ela_8xb32_in1k': '44.9',
}


@pytest.mark.parametrize('name', METHOD)
def test_printed_figures(name):
    """Rounded as the papers round."""
    folder = 'cifar' if 'cifar' in name else 'imagenet'
    decimals = len(METHOD[name].partition('.')[2])
    count = read_metafile(folder)[name]['Parameters (M)']
    assert f'{count:.{decimals}f}' == METHOD[name]


# Rows of each table, counted in the papers
TABLES = dict(
    MRLA=[49, 24, 18, 12, 10, 4, 6, 17, 18, 5, 11, 6],
    KCLA=[22, 19, 36, 24, 10],
    ELA=[24, 19, 6, 6, 28, 6, 6],
)


def test_rows_of_the_papers():
    """Each is a config that is there, or one of the ten that are not."""
    tables = ZOO['load_tables']()
    counts = {k: [len(rows) for rows in v.values()] for k, v in tables.items()}
    assert counts == TABLES
    listed = [row['config'] for _, row in ROWS]
    without = []
    for entry in sum((rows for v in tables.values() for rows in v.values()), []):
        if entry.startswith('none: '):
            without.append(entry)
        elif entry.startswith('studies/'):
            file, variant = entry.split('#')
            study = yaml.safe_load((ROOT / 'configs' / file).read_text('utf-8'))
            assert variant in study['variants'], entry
        elif entry.startswith('mmdet::'):
            mmdet = pytest.importorskip('mmdet')
            folder = Path(mmdet.__file__).parent / '.mim' / 'configs'
            assert (folder / entry[len('mmdet::') :]).is_file(), entry
        else:
            found = [name for name in listed if fnmatch(name, entry)]
            assert len(found) == 1 + entry.endswith('cifar10*'), entry
    assert len(without) == 10


def test_rows_say_where_they_are_from():
    """As the list of all rows does."""
    tables = ZOO['load_tables']()
    checked = 0
    for _, row in ROWS:
        for source in row.get('paper', '').split(';'):
            paper, _, rest = source.strip().partition(', ')
            for number in re.findall(r'\b(?:\d+|[IV]+)\b', rest.partition(':')[0]):
                entries = tables[paper][number]
                assert any(fnmatch(row['config'], entry) for entry in entries), row
                checked += 1
    assert checked > 150


@pytest.mark.parametrize(
    'folder, name, expected',
    [
        (
            'imagenet',
            'resnet50-mrla-light-d16_8xb32-coslr-lbs_in1k',
            ('./resnet50_8xb32-coslr-lbs_in1k.py', 'mrla-light-d16_in1k'),
        ),
        (
            'imagenet',
            'deit-small-dwconv_8xb128_in1k',
            ('./deit-small_8xb128_in1k.py', 'dwconv_deit'),
        ),
        (
            'retinanet',
            'retinanet_r50_ba_fpn_1x_coco',
            ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', 'ba_r50_coco'),
        ),
        (
            'unet',
            'unet_r18_kcla_isic2018-256x256',
            ('./unet_r18_plain_isic2018-256x256.py', 'kcla_unet'),
        ),
    ],
)
def test_what_a_row_is_put_together_from(folder, name, expected):
    base, attention = expected
    assert ZOO['bases_of'](folder, name) == [
        base,
        f'../_base_/attentions/{attention}.py',
    ]


def test_a_row_of_nothing():
    with pytest.raises(SystemExit, match='resnet50_8xb32_in1k.py with none_in1k.py'):
        ZOO['bases_of']('imagenet', 'resnet50-none_8xb32_in1k')


def test_nothing_is_written_twice():
    """A statement with more than two literals is in one config alone.

    But for studies: what was run stays as it was run, whatever changes beside it.
    """
    places = {}
    for path in sorted((ROOT / 'configs').rglob('*.py')):
        if 'studies' in path.parts:
            continue
        for statement in ast.parse(path.read_text('utf-8')).body:
            literals = [n for n in ast.walk(statement) if isinstance(n, ast.Constant)]
            if len(literals) > 2 and statement.targets[0].id != '_base_':
                places.setdefault(ast.dump(statement), []).append(path.name)
    assert len(places) > 40
    assert [names for names in places.values() if len(names) > 1] == []


def test_a_config_that_inherits(config_dir, tmp_path):
    """What a user sets in the backbone is merged into what a config has there."""
    pytest.importorskip('mmdet')
    base = config_dir / 'faster_rcnn' / 'faster-rcnn_r50_mrla-base_fpn_1x_coco.py'
    child = tmp_path / 'child.py'
    child.write_text(
        f'_base_ = {base.as_posix()!r}\n'
        'model = dict(backbone=dict(depth=101, layer_attention=dict(head_dim=16)))\n'
    )
    backbone = Config.fromfile(child).model.backbone
    assert backbone.depth == 101 and backbone.type == 'ELAResNet'
    assert backbone.layer_attention == dict(
        type='MRLABase', head_dim=16, zero_init=True
    )


@pytest.mark.parametrize(
    'name, row',
    [
        (f'resnet{dash}_{data}', f'{folder}/{net}{dash}_{batch}_{dataset}')
        for dash in ('', '-mla', '-mrla-base', '-mrla-light', '-kcla', '-ela')
        for data, folder, net, batch, dataset in (
            ('cifar', 'cifar', 'resnet20', '1xb128', 'cifar10'),
            ('in1k', 'imagenet', 'resnet50', '8xb32', 'in1k'),
        )
    ],
)
def test_models_that_older_configs_inherit(name, row):
    """They name what takes their place, and are still what the rows have."""
    pytest.importorskip('mmpretrain')
    configs = ROOT / 'configs'
    with pytest.warns(DeprecationWarning, match='Please use .*(cifar|in1k|resnet50)'):
        old = Config.fromfile(configs / '_base_' / 'models' / f'{name}.py')
    new = Config.fromfile(configs / f'{row}.py')
    assert old.model == new.model
    assert old.get('custom_hooks') == new.get('custom_hooks')
    assert old.get('custom_imports') == new.get('custom_imports')


@pytest.mark.parametrize('folder', ZOO['DETECTORS'])
def test_what_is_frozen_is_pretrained(folder):
    """Else a stem and a stage of random weights would stay random."""
    pytest.importorskip('mmdet')
    pretrain = pytest.importorskip('mmpretrain')
    for row in PAPERS[folder]['rows']:
        cfg = Config.fromfile(ROOT / 'configs' / folder / f'{row["config"]}.py')
        backbone = cfg.model.backbone
        assert backbone.frozen_stages == 1 and backbone.norm_eval
        assert backbone.init_cfg.type == 'Pretrained'
        checkpoint = f'torchvision://resnet{backbone.depth}'
        kind = row['config'].split('_')[2]
        if backbone.type == 'mmpretrain.SEResNet':
            name = f'seresnet{backbone.depth}_8xb32_in1k'
            checkpoint = pretrain.ModelHub.get(name).weights
        elif kind in ('eca', 'rla-g', 'ba', 'dla-light'):
            # Scaled from the start, not only once trained: from their classifiers
            name = f'resnet{backbone.depth}-{kind}_8xb32_in1k'
            trained = Config.fromfile(ROOT / 'configs' / 'imagenet' / f'{name}.py')
            expected = dict(trained.model.backbone.layer_attention)
            if kind == 'dla-light':  # the authors' detectors have narrower cells
                expected['reduction'] = 20
            assert backbone.layer_attention == expected
            checkpoint = f'work_dirs/{name}/epoch_{trained.train_cfg.max_epochs}.pth'
            assert backbone.init_cfg.prefix == 'backbone.'
        assert backbone.init_cfg.checkpoint == checkpoint, row['config']


def test_checkpoint_of_a_classifier_in_the_se_detectors(config_dir, tmp_path):
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    detectors = pytest.importorskip('mmdet.registry').MODELS
    pytest.importorskip('mmpretrain.models')
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(config_dir / 'imagenet' / 'seresnet50_8xb32_in1k.py')
    classifier = MODELS.build(cfg.model)
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=classifier.state_dict()), path)
    name = 'faster_rcnn/faster-rcnn_r50_se_fpn_1x_coco.py'
    cfg = Config.fromfile(config_dir / name).model.backbone
    cfg.init_cfg.checkpoint = str(path)
    backbone = detectors.build(cfg)
    backbone.init_weights()
    expected = classifier.backbone.state_dict()
    assert list(backbone.state_dict()) == list(expected)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_model_index_lists_every_metafile():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text('utf-8'))
    assert sorted(index['Import']) == sorted(
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'configs').glob('*/metafile.yml')
    )


def test_every_row_is_found_by_the_model_index():
    """As mim and the toolboxes read it."""
    modelindex = pytest.importorskip('modelindex.load_model_index')
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    names = sorted(model.name for model in index.models)
    assert names == sorted(row['config'] for _, row in ROWS)
    assert all((ROOT / model.config).is_file() for model in index.models)


def test_the_pages_are_up_to_date():
    """What the tool writes from papers.yml and the counts of the metafiles."""
    sections = []
    for folder, section in PAPERS.items():
        listed = [row['config'] for row in section['rows']]
        assert list(read_metafile(folder)) == listed
        rows = ZOO['count_section'](folder, section, reuse=True)
        path = ROOT / 'configs' / folder
        for name, text in (
            ('metafile.yml', ZOO['metafile'](folder, section, rows)),
            ('README.md', ZOO['readme'](section, rows)),
        ):
            assert (path / name).read_text('utf-8') == text, f'{folder}/{name}'
        sections.append(ZOO['page_section'](folder, section, rows))
    page = (ROOT / 'docs' / 'model_zoo.md').read_text('utf-8')
    assert page == ZOO['page'](sections)


def test_every_folder_is_in_the_readme():
    text = (ROOT / 'configs' / 'README.md').read_text('utf-8')
    for folder in (ROOT / 'configs').glob('[!_]*/'):
        if folder.is_dir():
            assert f'({folder.name})' in text
