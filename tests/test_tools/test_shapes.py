import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from mmela.tools import shapes as module
from mmela.tools.shapes import main, make_shapes

pytestmark = pytest.mark.filterwarnings(  # pycocotools with numpy 2
    'ignore:__array__ implementation:DeprecationWarning'
)
SMALL = dict(train=2, val=1, size=64)


def fingerprint(folder):
    """Hash of what a folder holds, pictures by their pixels."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        if path.suffix == '.png':
            digest.update(cv2.imread(str(path)).tobytes())
        else:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def ann_file(folder, split='train'):
    return folder / 'annotations' / f'instances_{split}2017.json'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('make_shapes') / 'shapes'
    assert make_shapes(path, train=48, val=16, size=128, seed=3)
    return path


@pytest.fixture(scope='module', params=['train', 'val'])
def coco(request, folder):
    coco = COCO(ann_file(folder, request.param))
    coco.folder = folder / f'{request.param}2017'
    return coco


class TestData:
    def test_layout(self, folder):
        assert sorted(p.name for p in folder.iterdir()) == [
            'annotations',
            'train2017',
            'val2017',
        ]
        assert not list(folder.parent.glob('.*'))  # no temporary folder

    def test_images(self, coco):
        names = [image['file_name'] for image in coco.loadImgs(coco.imgs)]
        assert names == sorted(p.name for p in coco.folder.iterdir())
        for image in coco.loadImgs(coco.imgs):
            pixels = cv2.imread(str(coco.folder / image['file_name']))
            assert pixels.shape == (image['height'], image['width'], 3)
            assert pixels.std() > 5  # not blank

    def test_categories_are_those_of_coco(self, coco):
        categories = coco.loadCats(coco.getCatIds())
        assert len(categories) == 80
        ids = {c['name']: c['id'] for c in categories}
        # Spot checks against COCO's own files
        assert ids['person'] == 1 and ids['stop sign'] == 13
        assert ids['kite'] == 38 and ids['toothbrush'] == 90
        coco_datasets = pytest.importorskip('mmdet.datasets', exc_type=ImportError)
        classes = coco_datasets.CocoDataset.METAINFO['classes']
        assert tuple(ids) == classes

    def test_all_shapes_appear(self, coco):
        used = {a['category_id'] for a in coco.anns.values()}
        names = {c['name'] for c in coco.loadCats(list(used))}
        assert names == set(module.SHAPES)

    def test_masks_agree_with_boxes_and_areas(self, coco):
        for ann in coco.anns.values():
            mask = coco.annToMask(ann)
            ys, xs = np.nonzero(mask)
            assert ann['area'] == mask.sum() > 0
            assert ann['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert isinstance(ann['segmentation'], dict if ann['iscrowd'] else list)

    def test_no_pixel_belongs_to_two(self, coco):
        for image_id in coco.imgs:
            anns = coco.loadAnns(coco.getAnnIds(image_id))
            total = sum(coco.annToMask(ann).astype(int) for ann in anns)
            assert np.max(total) <= 1

    def test_objects_hide_each_other(self, coco):
        """Boxes overlap although masks do not."""
        overlapping = 0
        for image_id in coco.imgs:
            anns = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
            boxes = np.array([ann['bbox'] for ann in anns], float)
            if len(boxes) > 1:
                iou = mask_api.iou(boxes, boxes, [0] * len(boxes))
                overlapping += (iou > 0.1).sum() - len(boxes)
        assert overlapping > len(coco.imgs) / 2

    def test_every_kind_of_scene(self, coco):
        counts = [len(coco.getAnnIds(i, iscrowd=False)) for i in coco.imgs]
        empty = [i for i in coco.imgs if not coco.getAnnIds(i)]
        assert 0 < len(empty) < len(counts) / 4
        assert max(counts) >= 6
        crowds = coco.loadAnns(coco.getAnnIds(iscrowd=True))
        assert 0 < len(crowds) < len(counts) / 4

    def test_annotation_ids_are_unique(self, coco):
        assert len(coco.anns) == len(coco.dataset['annotations'])


@pytest.mark.parametrize('kind', ['ring', 'touching', 'full', 'random'])
def test_polygons_give_the_mask_back(kind):
    mask = np.zeros((23, 31), bool)
    if kind == 'ring':  # a hole one pixel wide, and one at a distance
        mask[3:9, 4:20] = True
        mask[5, 7] = mask[4:8, 12:17] = False
    elif kind == 'touching':  # parts that meet at a corner, and the border
        mask[:4, :5] = mask[4:9, 5:11] = mask[22, 30] = True
    elif kind == 'full':
        mask[:] = True
    else:
        mask = np.random.default_rng(0).random(mask.shape) < 0.6
    polygons = module.mask_to_polygons(mask)
    rle = mask_api.merge(mask_api.frPyObjects(polygons, *mask.shape))
    assert (mask_api.decode(rle) == mask).all()


@pytest.mark.parametrize('first', [0, 1])
def test_run_lengths_give_the_mask_back(first):
    mask = np.random.default_rng(0).random((9, 7)) < 0.5
    mask[0, 0] = first
    counts = module.mask_to_counts(mask)
    rle = mask_api.frPyObjects(dict(counts=counts, size=[9, 7]), 9, 7)
    assert (mask_api.decode(rle) == mask).all()


class TestDeterminism:
    def test_same_arguments_same_data(self, tmp_path):
        make_shapes(tmp_path / 'a', **SMALL)
        make_shapes(tmp_path / 'b', **SMALL)
        make_shapes(tmp_path / 'c', **SMALL, seed=1)
        a, b, c = (fingerprint(tmp_path / name) for name in 'abc')
        assert a == b != c

    def test_an_image_does_not_depend_on_the_others(self, tmp_path, folder):
        make_shapes(tmp_path / 'few', train=3, val=1, size=128, seed=3)
        few, many = (
            json.loads(ann_file(path).read_text('utf-8'))['annotations']
            for path in (tmp_path / 'few', folder)
        )
        assert few == many[: len(few)]
        for path in (tmp_path / 'few' / 'train2017').iterdir():
            assert path.read_bytes() == (folder / 'train2017' / path.name).read_bytes()

    def test_unchanged_since_version_1(self, tmp_path):
        """If this fails on purpose, raise VERSION in the tool."""
        make_shapes(tmp_path / 'a', train=6, val=1, size=64)
        digest = fingerprint(tmp_path / 'a')
        assert (module.VERSION, digest[:16]) == (1, 'f8f5dab994437dd1')


class TestReuse:
    def test_the_same_is_reused(self, tmp_path):
        path = tmp_path / 'deep' / 'shapes'
        assert make_shapes(path, **SMALL)
        times = {p: p.stat().st_mtime_ns for p in path.rglob('*')}
        assert not make_shapes(path, **SMALL)
        assert times == {p: p.stat().st_mtime_ns for p in path.rglob('*')}

    def test_another_needs_force(self, tmp_path):
        path = tmp_path / 'shapes'
        make_shapes(path, **SMALL)
        before = fingerprint(path)
        with pytest.raises(FileExistsError, match="'seed': 5.*--force"):
            make_shapes(path, **SMALL, seed=5)
        assert fingerprint(path) == before
        assert make_shapes(path, **SMALL, seed=5, force=True)
        assert fingerprint(path) != before
        assert [p.name for p in tmp_path.iterdir()] == ['shapes']

    def test_incomplete_needs_force(self, tmp_path):
        path = tmp_path / 'shapes'
        make_shapes(path, **SMALL)
        before = fingerprint(path)
        shutil.rmtree(path / 'val2017')
        with pytest.raises(FileExistsError, match='incomplete'):
            make_shapes(path, **SMALL)
        assert make_shapes(path, **SMALL, force=True)
        assert fingerprint(path) == before

    @pytest.mark.parametrize('force', [False, True])
    def test_foreign_folder_stays(self, tmp_path, force):
        path = ann_file(tmp_path / 'coco')
        path.parent.mkdir(parents=True)
        path.write_text('{"info": {"description": "COCO"}, "images": []}')
        with pytest.raises(FileExistsError, match='not a data set of this tool'):
            make_shapes(tmp_path / 'coco', **SMALL, force=force)
        assert list((tmp_path / 'coco').rglob('*')) == [path.parent, path]

    def test_file_stays(self, tmp_path):
        (tmp_path / 'file').write_text('mine')
        with pytest.raises(FileExistsError):
            make_shapes(tmp_path / 'file', **SMALL, force=True)
        assert (tmp_path / 'file').read_text() == 'mine'

    def test_empty_folder_is_used(self, tmp_path):
        (tmp_path / 'empty').mkdir()
        assert make_shapes(tmp_path / 'empty', **SMALL)

    def test_a_failure_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cv2, 'imencode', lambda *_: (False, None))
        with pytest.raises(OSError, match='cannot encode'):
            make_shapes(tmp_path / 'shapes', **SMALL)
        assert not list(tmp_path.iterdir())


class TestTwoAtOnce:
    """Another process fills the folder while this one renders."""

    @staticmethod
    def beside(monkeypatch, path, **kwargs):
        original = module._write_split

        def write_split(folder, split, *args):
            original(folder, split, *args)
            if split == 'val':
                monkeypatch.setattr(module, '_write_split', original)
                make_shapes(path, **kwargs)

        monkeypatch.setattr(module, '_write_split', write_split)

    @pytest.mark.parametrize('empty', [False, True])
    def test_the_same(self, tmp_path, monkeypatch, empty):
        path = tmp_path / 'shapes'
        if empty:
            path.mkdir()
        self.beside(monkeypatch, path, **SMALL)
        assert not make_shapes(path, **SMALL)
        assert [p.name for p in tmp_path.iterdir()] == ['shapes']
        assert not make_shapes(path, **SMALL)  # complete

    def test_another(self, tmp_path, monkeypatch):
        path = tmp_path / 'shapes'
        self.beside(monkeypatch, path, **SMALL, seed=1)
        with pytest.raises(FileExistsError, match='has written to .*shapes while'):
            make_shapes(path, **SMALL)
        assert not make_shapes(path, **SMALL, seed=1)
        assert [p.name for p in tmp_path.iterdir()] == ['shapes']

    def test_what_was_there_comes_back(self, tmp_path, monkeypatch):
        """Where the new data cannot take the place of the old."""
        path = tmp_path / 'shapes'
        make_shapes(path, **SMALL)
        before = fingerprint(path)
        rename = Path.rename
        monkeypatch.setattr(
            Path,
            'rename',
            lambda a, b: rename(a, '/') if a.name == 'new' else rename(a, b),
        )
        with pytest.raises(FileExistsError):
            make_shapes(path, **SMALL, seed=1, force=True)
        assert fingerprint(path) == before


@pytest.mark.parametrize(
    'text',
    [
        '',
        '[]',
        '{"info": 1}',
        '{"info": {"generator": "mmela make_shapes"}, "images": [1]}',
        '{"info": {"generator": "mmela make_shapes"}, "images": []}',
        '{"info": {"generator": "mmela make_shapes"}, "images": [{"file_name": 1}]}',
        '[' * 100000,
    ],
    ids=['empty', 'list', 'number', 'image', 'no-version', 'name', 'deep'],
)
def test_broken_annotations_are_one_line(tmp_path, text):
    path = ann_file(tmp_path / 'shapes')
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(
        SystemExit, match='^error: .*shapes (exists|has shapes)'
    ) as error:
        main([str(tmp_path / 'shapes'), '--train', '2', '--val', '1', '--size', '64'])
    assert '\n' not in str(error.value)
    assert path.read_text() == text


class TestBadInput:
    @pytest.mark.parametrize(
        ('name', 'value', 'allowed'),
        [
            ('train', 0, 'at least 1'),
            ('val', -3, 'at least 1'),
            ('size', 63, '64 to 2048'),
            ('size', 2049, '64 to 2048'),
            ('seed', -1, 'at least 0'),
        ],
    )
    def test_out_of_range(self, tmp_path, name, value, allowed):
        with pytest.raises(ValueError, match=f'{name} must be {allowed}, got {value}'):
            make_shapes(tmp_path / 'x', **{name: value})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize('value', [1.5, '8', True, None])
    def test_no_integer(self, tmp_path, value):
        with pytest.raises(TypeError, match='train must be an integer'):
            make_shapes(tmp_path / 'x', train=value)

    def test_command_line(self, tmp_path, capsys):
        out = str(tmp_path / 'x')
        with pytest.raises(SystemExit, match='^error: size must be 64 to'):
            main([out, '--size', '8'])
        main([out, '--train', '2', '--val', '1', '--size', '64'])
        assert 'rendered' in capsys.readouterr().out
        main([out, '--train', '2', '--val', '1', '--size', '64'])
        assert 'already exist' in capsys.readouterr().out

    def test_help_has_an_example(self, capsys):
        with pytest.raises(SystemExit):
            main(['--help'])
        assert 'mmela shapes data/shapes --train' in capsys.readouterr().out
