import gc
import logging
from pathlib import Path

import pytest
from hypothesis import settings
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

import mmela  # noqa: F401  (first, so that mmcv-lite has operators)
from tests.helpers.fresh import hurry

hurry()

# The same examples in each run, and no example files in the checkout
settings.register_profile('mmela', derandomize=True, deadline=None, database=None)
settings.load_profile('mmela')

ROOT = Path(__file__).resolve().parents[1]

# Start these first, or one process ends with them while the others have nothing to do
SLOW = ('test_notebook.py', 'test_interruption.py', 'test_end_to_end.py')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Run tests that share a module's fixture in one process, and slow ones first."""
    items.sort(key=lambda item: item.path.name not in SLOW)
    if not config.pluginmanager.hasplugin('xdist'):
        return
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(fixture.scope == 'module' for (*_, fixture) in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def set_aside() -> None:
    """Leave out of later collections of garbage what is alive now.

    Each would look through all modules of torch and the toolboxes again, which takes
    up to a second.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    set_aside()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.module is not item.module:
        set_aside()


@pytest.fixture(autouse=True)
def as_new() -> None:
    """Reset the default scope and the level of the log, which a test may have set."""
    DefaultScope._instance_dict.clear()
    # init_weights logs a line for each parameter
    MMLogger.get_current_instance().setLevel(logging.WARNING)


@pytest.fixture(scope='session')
def config_dir() -> Path:
    return ROOT / 'configs'


@pytest.fixture(scope='session')
def shapes(tmp_path_factory) -> Path:
    """A tiny data set in COCO layout."""
    from mmela.tools.shapes import make_shapes

    path = tmp_path_factory.mktemp('data') / 'shapes'
    make_shapes(path, train=6, val=3, size=96, seed=0)
    return path


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A local stand-in for the Hugging Face Hub."""
    constants = pytest.importorskip('huggingface_hub.constants')
    from tests.helpers.hub import StandInHub

    hub = StandInHub()
    monkeypatch.setenv('HF_TOKEN', hub.token)
    monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path_factory.mktemp('hf')))
    monkeypatch.setattr(
        constants,
        'HUGGINGFACE_CO_URL_TEMPLATE',
        hub.url + '/{repo_id}/resolve/{revision}/{filename}',
    )
    yield hub
    hub.close()
