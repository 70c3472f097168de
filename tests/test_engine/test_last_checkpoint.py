"""A run goes on from its newest whole checkpoint, whatever a kill has left."""

import shutil

import pytest

from tests.helpers.runs import log_of
from tests.helpers.toy import toy_config, train

pytestmark = pytest.mark.usefixtures('whole')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('whole')
    train(toy_config(work_dir, epochs=3))
    return work_dir


@pytest.mark.parametrize('note', ['', '\n', 'not there.pth', '{dir}/epoch_3.pth'])
def test_goes_on_from_the_newest_that_is_whole(whole, tmp_path, note):
    shutil.copytree(whole, tmp_path / 'run')
    run = tmp_path / 'run'
    cut = run / 'epoch_3.pth'
    cut.write_bytes(cut.read_bytes()[:2000])
    (run / 'last_checkpoint').write_text(note.format(dir=run))
    runner = train(toy_config(run, epochs=4), resume=True)
    assert runner.epoch == 4
    assert f'Resuming from the newest complete one, {run}/epoch_2.pth' in log_of(runner)
    assert (run / 'last_checkpoint').read_text() == str(run / 'epoch_4.pth')


def test_begins_where_none_is_whole(whole, tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'last_checkpoint').write_text('')
    runner = train(toy_config(run, epochs=1), resume=True)
    assert runner.epoch == 1
    assert 'has no complete checkpoint' in log_of(runner)


def test_whole_ones_are_left_alone(whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    run = tmp_path / 'run'
    (run / 'last_checkpoint').write_text(str(run / 'epoch_1.pth'))
    runner = train(toy_config(run, epochs=3), resume=True)
    assert 'missing or incomplete' not in log_of(runner)


@pytest.mark.parametrize('counts, warned', [(2, True), (3, False), (1, False)])
def test_accumulation_across_epochs_is_said(tmp_path, counts, warned):
    cfg = toy_config(tmp_path, dict(windows=[(1, 1)]), epochs=1, size=12, batch_size=4)
    cfg.optim_wrapper.accumulative_counts = counts
    assert ('does not divide the 3 iterations' in log_of(train(cfg))) is warned
