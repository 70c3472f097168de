"""Runs side by side: order, retries, kills."""

import multiprocessing
import os
import signal
import threading
from functools import partial

import pytest
from rich.console import Console

from mmela.studies import driver
from mmela.studies.driver import LocalExecutor, run_all
from mmela.studies.run import LOG
from mmela.studies.train import Limits
from tests.helpers.studies import is_gone, processes, tiny_jobs, wait_for

TINY = dict(config='tiny.py')


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(driver, 'PAUSE', 0.02)


def run(jobs, slots=2, retries=2):
    limits = Limits(retries=retries)
    return run_all(jobs, LocalExecutor(slots), limits, lambda job: 'well')


def metrics(job):
    return {k: v['accuracy/top1'] for k, v in job.results().metrics.items()}


def trained(job):
    """Epochs in the order in which they were trained."""
    text = (job.folder / LOG).read_text()
    return [int(x.split(']')[0]) for x in text.split('Epoch(train)  [')[1:]]


def test_a_killed_worker_is_started_again(tmp_path, capsys):
    """And nothing is trained twice, nor is the result another."""
    _, undisturbed = tiny_jobs(tmp_path, out='a')
    assert run(undisturbed) == {}
    _, jobs = tiny_jobs(tmp_path, out='b', options={'die_at': 2})
    assert run(jobs) == {}
    for job, other in zip(jobs, undisturbed):
        assert metrics(job) == metrics(other) and len(metrics(job)) == 3
        assert trained(job) == trained(other) == [1, 2, 3]
        assert [a.exit for a in job.record.attempts] == [-9, 0]
    assert 'signal SIGKILL; restarting (1 of 2)' in capsys.readouterr().out


def test_a_run_that_fails(tmp_path, capsys):
    """It is tried again, told of, and holds up only what starts from it."""
    start = dict(variant='bad', checkpoint='epoch_1.pth', how='load')
    _, jobs = tiny_jobs(
        tmp_path,
        variants=dict(
            bad=dict(TINY, options={'fail_at': 2}),
            after=dict(TINY, start=start),
            good=TINY,
        ),
        compare=[],
    )
    bad, after, good = jobs
    failures = run(jobs, retries=1)
    assert set(failures) == {'bad seed 0', 'after seed 0'}
    assert failures['bad seed 0'].startswith('exit code 3; the end of ')
    assert 'no luck in epoch 2' in failures['bad seed 0']
    assert failures['after seed 0'] == 'bad seed 0 failed'
    assert good.done and not bad.done and not after.folder.exists()
    assert [a.exit for a in bad.record.attempts] == [3, 3]
    assert trained(bad) == [1]
    out = capsys.readouterr().out
    assert 'good seed 0 is done: well' in out


def test_starts_when_the_other_is_done(tmp_path):
    start = dict(variant='base', checkpoint='epoch_2.pth', how='resume')
    _, (base, other) = jobs = tiny_jobs(
        tmp_path,
        variants=dict(other=dict(TINY, start=start), base=dict(TINY)),
        compare=[],
    )
    assert run(jobs[1]) == {}
    assert trained(other) == [3] and metrics(other)[3] == metrics(base)[3]
    (first,), (second,) = base.record.attempts, other.record.attempts
    assert second.started >= first.started + first.seconds


def drive(jobs):
    """A driver in a process of its own, which ends with 0 if nothing fails."""

    def target():
        raise SystemExit(len(run(jobs)))

    process = multiprocessing.get_context('fork').Process(target=target)
    process.start()
    return process


@pytest.mark.parametrize('number', ['SIGKILL', 'SIGTERM', 'SIGINT'])
def test_a_killed_driver(tmp_path, number):
    """It takes its workers along, and the next one goes on where they were."""
    _, jobs = tiny_jobs(tmp_path, options={'hold': str(tmp_path / 'go')})
    process = drive(jobs)
    for job in jobs:
        wait_for((job.folder / 'epoch_1.pth').exists)
    os.kill(process.pid, getattr(signal, number))
    process.join()
    assert process.exitcode == (-9 if number == 'SIGKILL' else 1)
    for job in jobs:
        wait_for(lambda job=job: is_gone(processes(job)[0]))
    (tmp_path / 'go').touch()
    assert run(jobs) == {}
    for _ in range(2):
        for job in jobs:
            assert job.done and trained(job) == [1, 2, 3]
            assert len(job.record.attempts) == 2
        assert run(jobs) == {}


def test_two_drivers(tmp_path):
    """The second waits for what is about to end, and nothing is trained twice."""
    _, jobs = tiny_jobs(tmp_path, options={'hold': str(tmp_path / 'go')})
    drivers = [drive(jobs), drive(jobs)]
    for job in jobs:
        wait_for((job.folder / 'epoch_1.pth').exists)
    (tmp_path / 'go').touch()
    for process in drivers:
        process.join()
        assert process.exitcode == 0
    for job in jobs:
        assert job.done and trained(job) == [1, 2, 3]
        assert len(job.record.attempts) == 1


def test_gpus(monkeypatch):
    monkeypatch.setattr(driver.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert driver.visible_gpus() == ['0', '1']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3, 5')
    assert driver.visible_gpus() == ['3', '5']


def test_runs_share_gpus(monkeypatch):
    """Each that runs has one, and gives it back."""
    monkeypatch.setattr(driver, 'visible_gpus', lambda: ['3', '5'])
    meet = threading.Barrier(2)

    def train(name, device, stop):
        meet.wait(60)
        return name, device

    with LocalExecutor(2) as executor:
        results = [executor.submit(train, name) for name in 'abcdef']
        pairs = [future.result() for future in results]
    assert [name for name, _ in pairs] == list('abcdef')
    assert sorted(device for _, device in pairs) == ['3'] * 3 + ['5'] * 3


def test_bars(tmp_path, monkeypatch, capsys):
    """On a terminal, of each run and of all."""
    monkeypatch.setattr(driver, 'Console', partial(Console, force_terminal=True))
    monkeypatch.setenv('COLUMNS', '120')
    _, jobs = tiny_jobs(tmp_path, options={'hold': str(tmp_path / 'go')})
    threading.Timer(3, (tmp_path / 'go').touch).start()
    assert run(jobs) == {}
    out = capsys.readouterr().out
    assert 'all runs' in out and 'epoch 1/3, 1/1' in out
    assert out.count(' is done: well') == 2
