"""Runs on a Ray cluster, here one of this machine."""

import os
import signal
import threading

import pytest

from mmela.studies.driver import RayExecutor, run_all
from mmela.studies.train import Limits
from tests.helpers.studies import is_gone, processes, tiny_jobs, wait_for

ray = pytest.importorskip('ray')


@pytest.fixture
def local(monkeypatch, tmp_path_factory):
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '0')
    # Where newer versions keep a token
    monkeypatch.setenv('HOME', str(tmp_path_factory.mktemp('home')))
    with RayExecutor('local', Limits(retries=1)) as executor:
        yield executor


def test_a_killed_ray_worker(local, tmp_path):
    """Ray starts its task again, which goes on; what fails holds up its own."""
    assert local.slots >= 1
    start = dict(variant='killed', checkpoint='epoch_3.pth', how='load')
    failing = dict(variant='bad', checkpoint='epoch_1.pth', how='load')
    tiny = dict(config='tiny.py')
    _, jobs = tiny_jobs(
        tmp_path,
        variants=dict(
            killed=dict(tiny, options={'hold': str(tmp_path / 'go')}),
            after=dict(tiny, start=start),
            bad=dict(tiny, options={'fail_at': 1}),
            after_bad=dict(tiny, start=failing),
        ),
        compare=[],
    )
    killed, after, bad, after_bad = jobs

    def kill():
        wait_for((killed.folder / 'epoch_1.pth').exists)
        training, worker = processes(killed)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: is_gone(training))
        (tmp_path / 'go').touch()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    failures = run_all(jobs, local, Limits(retries=1), lambda job: 'well')
    assert set(failures) == {bad.name, after_bad.name}
    assert failures[bad.name].startswith('exit code 3; the end of ')
    assert len(bad.record.attempts) == 2 and not after_bad.folder.exists()
    assert killed.done and after.done
    assert [a.exit for a in killed.record.attempts] == [None, 0]
    values = [m['accuracy/top1'] for m in killed.results().metrics.values()]
    assert values == [31**n % 1009 / 10.09 for n in (1, 2, 3)]
    assert after.results().metrics[3]['accuracy/top1'] == 31**6 % 1009 / 10.09


def test_no_cluster(monkeypatch):
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    with pytest.raises(ValueError, match="there is no Ray cluster at '127.0.0.1:1'"):
        RayExecutor('127.0.0.1:1', Limits())
