"""Parameters of every config against the papers, and the written figures."""

import logging
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.logging import MMLogger

ROOT = Path(__file__).resolve().parents[2]
ZOO = runpy.run_path(str(ROOT / 'tools' / 'analysis' / 'model_zoo.py'))
PAPERS = ZOO['load_papers']()
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
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    count = ZOO['count_parameters'](folder, ZOO['build'](folder, name))
    written = ZOO['read_metafile'](folder)[name]
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
    count = ZOO['read_metafile'](folder)[name]['Parameters (M)']
    assert f'{count:.{decimals}f}' == METHOD[name]


@pytest.mark.parametrize(
    'path',
    sorted(
        p.relative_to(ROOT / 'configs').as_posix()
        for p in (ROOT / 'configs').glob('*/*.py')
        if not p.parent.name.startswith('_')
    ),
)
def test_every_config_reads_and_is_listed(path):
    folder, name = path.split('/')
    scope = NEEDS.get(folder, 'mmdet')
    pytest.importorskip(scope)
    cfg = Config.fromfile(ROOT / 'configs' / path)
    assert cfg.default_scope == scope
    listed = {row['config'] for f, row in ROWS if f == folder}
    unlisted = ('folder', 'shapes', 'lesions')
    assert name[:-3] in listed or any(word in name for word in unlisted)


def test_model_index_lists_every_metafile():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text('utf-8'))
    assert sorted(index['Import']) == sorted(
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'configs').glob('*/metafile.yml')
    )


def test_the_page_is_up_to_date():
    page = (ROOT / 'docs' / 'model_zoo.md').read_text('utf-8')
    for folder in PAPERS:
        for name, data in ZOO['read_metafile'](folder).items():
            (line,) = [x for x in page.splitlines() if f'[{name}](' in x]
            assert f'| {data[ZOO["parameters_key"](folder)]:.3f}' in line
            assert f'| {data["FLOPs (G)"]:.4g} |' in line
