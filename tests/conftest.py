from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def config_dir() -> Path:
    return ROOT / 'configs'


@pytest.fixture(scope='session')
def coco128() -> Path:
    """A COCO-layout folder of real images, which not every machine has."""
    path = ROOT.parent / 'shared' / 'data' / 'coco128'
    if not path.is_dir():
        pytest.skip(f'no {path.name} beside the checkout')
    return path
