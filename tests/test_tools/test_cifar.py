"""mmela cifar, and that the configs read what it writes."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mmela.tools import cifar

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ('airplane', 'automobile', 'bird')


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def images(tmp_path):
    """Archive of 4 training images and 2 test images of each class."""
    path = tmp_path / 'images.tar.xz'
    rng = np.random.default_rng(0)
    with tarfile.open(path, 'w:xz') as tar:
        for split, count in (('train', 4), ('test', 2)):
            for cls in CLASSES:
                for i in range(count):
                    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                    content = cv2.imencode('.jpg', image)[1].tobytes()
                    add(tar, f'{split}/{cls}/{i:04}.jpg', content)
        add(tar, 'README', b'not an image')
    return path


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.jpg'))


def test_images(images, tmp_path, capsys):
    out = tmp_path / 'data' / 'folder'
    cifar.main([str(images), str(out)])
    assert len(files(out)) == 3 * (4 + 2)
    assert not (out / 'README').exists()
    assert '12 images for training, 6 for testing' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='already exists'):
        cifar.main([str(images), str(out)])
    cifar.main([str(images), str(out), '--keep'])  # for commands run again
    assert 'already exists' in capsys.readouterr().out


def test_a_fixed_part_of_the_images(images, tmp_path):
    out = tmp_path / 'folder'
    cifar.main([str(images), str(out), '--per-class', '2'])
    assert [f for f in files(out) if f.startswith('train/bird')] == [
        'train/bird/0000.jpg',
        'train/bird/0001.jpg',
    ]
    with pytest.raises(SystemExit, match='--per-class 0'):
        cifar.main([str(images), str(tmp_path / 'b'), '--per-class', '0'])


def test_folder_config_reads_them(images, tmp_path, config_dir):
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import DATASETS

    cifar.main([str(images), str(tmp_path / 'folder')])
    cfg = Config.fromfile(
        config_dir / 'cifar' / 'resnet20-ela_1xb128_cifar10-folder.py'
    )
    cfg.train_dataloader.dataset.data_root = str(tmp_path / 'folder')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert dataset.CLASSES == CLASSES
    assert len(dataset) == 12
    assert dataset[0]['inputs'].shape == (3, 32, 32)
    assert cfg.data_preprocessor.to_rgb


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Archive in the layout of the official CIFAR-10, with 5 + 1 images."""
    pytest.importorskip('mmpretrain')
    from mmpretrain.datasets import CIFAR10

    path = tmp_path / 'cifar-10-python.tar.gz'
    rng = np.random.default_rng(0)
    checksums = {}
    with tarfile.open(path, 'w:gz') as tar:
        names = [n for n, _ in CIFAR10.train_list + CIFAR10.test_list]
        for label, name in enumerate([*names, 'batches.meta']):
            content = pickle.dumps(
                dict(
                    data=rng.integers(0, 256, (1, 3072), np.uint8),
                    labels=[label],
                    label_names=[],
                )
            )
            add(tar, f'cifar-10-batches-py/{name}', content)
            checksums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(cifar.OFFICIAL, 'cifar-10-batches-py', cifar.md5(path))
    for attribute in ('train_list', 'test_list'):
        monkeypatch.setattr(
            CIFAR10,
            attribute,
            [[n, checksums[n]] for n, _ in getattr(CIFAR10, attribute)],
        )
    monkeypatch.setitem(CIFAR10.meta, 'md5', checksums['batches.meta'])
    return path


def test_config_reads_the_official_archive(official, tmp_path, config_dir):
    from mmpretrain.registry import DATASETS

    cifar.main([str(official), str(tmp_path / 'cifar10')])
    cfg = Config.fromfile(config_dir / 'cifar/resnet20-ela_1xb128_cifar10.py')
    cfg.train_dataloader.dataset.data_root = str(tmp_path / 'cifar10')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert dataset.get_gt_labels().tolist() == [0, 1, 2, 3, 4]


def test_changed_official_archive(official, tmp_path):
    with open(official, 'ab') as file:
        file.write(b'\0')
    with pytest.raises(SystemExit, match='MD5 checksum'):
        cifar.main([str(official), str(tmp_path / 'cifar10')])
    assert not (tmp_path / 'cifar10').exists()


def test_other_archives(tmp_path):
    path = tmp_path / 'other.tar'
    with tarfile.open(path, 'w') as tar:
        add(tar, 'readme.txt', b'hello')
    with pytest.raises(SystemExit, match='neither'):
        cifar.main([str(path), str(tmp_path / 'out')])
    path.write_bytes(b'no archive')
    with pytest.raises(SystemExit, match='cannot be read'):
        cifar.main([str(path), str(tmp_path / 'out')])
    with pytest.raises(SystemExit, match='there is no file'):
        cifar.main([str(tmp_path / 'missing'), str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_nothing_is_written_outside(tmp_path):
    path = tmp_path / 'evil.tar'
    with tarfile.open(path, 'w') as tar:
        add(tar, 'train/bird/0.jpg', b'1')
        link = tarfile.TarInfo('train/cat')
        link.type, link.linkname = tarfile.SYMTYPE, '/tmp'
        tar.addfile(link)
        add(tar, 'train/../../escaped.jpg', b'1')
    cifar.main([str(path), str(tmp_path / 'deep' / 'er' / 'out')])
    assert not list(tmp_path.rglob('escaped.jpg'))
