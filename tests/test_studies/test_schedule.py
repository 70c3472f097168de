"""Runs side by side: order, retries, kills."""

import multiprocessing
import os
import signal

import pytest

from mmela.studies import schedule
from mmela.studies.run import LOG
from mmela.studies.schedule import LocalRuns, duration, estimates, plan, select
from tests.helpers.studies import is_gone, processes, tiny_jobs, wait_for

TINY = dict(config='tiny.py')


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(schedule, 'PAUSE', 0.02)


def run(jobs, slots=2, retries=2):
    return LocalRuns(jobs, slots, 1, retries, lambda job: 'well').run()


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
        assert [a['exit'] for a in job.record['attempts']] == [-9, 0]
    assert 'signal SIGKILL; it is started again (1 of 2)' in capsys.readouterr().out


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
    assert [a['exit'] for a in bad.record['attempts']] == [3, 3]
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
    ended = sum(base.record['attempts'][0][key] for key in ('started', 'seconds'))
    assert other.record['attempts'][0]['started'] >= ended


def drive(jobs):
    """A driver in a process of its own."""
    process = multiprocessing.get_context('fork').Process(target=run, args=(jobs,))
    process.start()
    return process


@pytest.mark.parametrize('number', ['SIGKILL', 'SIGTERM', 'SIGINT'])
def test_a_killed_driver(tmp_path, number):
    """It takes its workers along, and the next one goes on where they were."""
    _, jobs = tiny_jobs(tmp_path, options={'hold': str(tmp_path / 'go')})
    driver = drive(jobs)
    for job in jobs:
        wait_for((job.folder / 'epoch_1.pth').exists)
    os.kill(driver.pid, getattr(signal, number))
    driver.join()
    assert driver.exitcode == (-9 if number == 'SIGKILL' else 1)
    for job in jobs:
        wait_for(lambda job=job: is_gone(processes(job)[0]))
    (tmp_path / 'go').touch()
    assert run(jobs) == {}
    for _ in range(2):
        for job in jobs:
            assert job.done and trained(job) == [1, 2, 3]
            assert len(job.record['attempts']) == 2
        assert run(jobs) == {}


def test_two_drivers(tmp_path):
    """They share the runs, and none is trained twice."""
    _, jobs = tiny_jobs(tmp_path, options={'hold': str(tmp_path / 'go')})
    drivers = [drive(jobs), drive(jobs)]
    for job in jobs:
        wait_for((job.folder / 'epoch_1.pth').exists)
    (tmp_path / 'go').touch()
    for driver in drivers:
        driver.join()
        assert driver.exitcode == 0
    for job in jobs:
        assert job.done and trained(job) == [1, 2, 3]
        assert len(job.record['attempts']) == 1


def test_select(tmp_path):
    start = dict(variant='base', checkpoint='epoch_1.pth', how='load')
    further = dict(variant='ela', checkpoint='epoch_1.pth', how='load')
    _, jobs = tiny_jobs(
        tmp_path,
        variants=dict(
            plain=TINY,
            base=TINY,
            ela=dict(TINY, start=start),
            tuned=dict(TINY, start=further),
        ),
        compare=[],
    )
    names = [job.variant for job in select(jobs, ['tuned'])]
    assert names == ['base', 'ela', 'tuned']
    assert [job.variant for job in select(jobs, ['plain'])] == ['plain']
    assert select(jobs) == jobs


def test_gpus(monkeypatch):
    monkeypatch.setattr(schedule.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert schedule.visible_gpus() == ['0', '1']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3, 5')
    assert schedule.visible_gpus() == ['3', '5']


@pytest.fixture
def timed(tmp_path):
    """Two seeds of two variants that start from base; base seed 0 took 30 s."""
    start = dict(variant='base', checkpoint='epoch_1.pth', how='resume')
    _, jobs = tiny_jobs(
        tmp_path,
        seeds=(0, 1),
        variants=dict(base=TINY, a=dict(TINY, start=start)),
        compare=[],
    )
    assert list(plan(jobs, jobs, 2))[-1].startswith('time to go unknown')
    jobs[0].folder.mkdir(parents=True)
    attempts = [dict(seconds=10.0), dict(seconds=20.0)]
    jobs[0].write(dict(done=True, attempts=attempts))
    return jobs


def test_estimates(timed):
    """10 s an epoch: of base; of a, which has two left, by what base takes."""
    _, a0, base1, a1 = timed
    seconds = estimates([a0, base1, a1], timed)
    assert seconds == {a0.work_dir: 20.0, base1.work_dir: 30.0, a1.work_dir: 20.0}
    # Side by side a0 and base1, then a1 after base1
    assert schedule.simulate([a0, base1, a1], seconds, 2) == 50.0
    assert schedule.simulate([a0, base1, a1], seconds, 1) == 70.0
    a0.folder.mkdir(parents=True)
    a0.write(dict(done=True, attempts=[dict(seconds=8.0)]))  # 4 s for each of two
    assert estimates([a1], timed) == {a1.work_dir: 8.0}


def test_plan(timed):
    lines = list(plan(timed, timed, 2))
    assert lines[0].split() == ['base', 'seed', '0', 'done']
    assert lines[1].endswith('3 epochs, about 20 s, resume epoch_1.pth of base')
    assert lines[-2:] == ['1 of 4 runs done, 2 side by side', 'about 50 s to go']


@pytest.mark.parametrize(
    'seconds, text',
    [(12.4, '12 s'), (90, '2 min'), (3599, '1 h 00 min'), (86400, '24 h 00 min')],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_prepare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule.prepare(["python -c \"open('a b', 'w')\""])
    assert (tmp_path / 'a b').exists()
    with pytest.raises(ValueError, match='exit code 4'):
        schedule.prepare(['python -c "raise SystemExit(4)"'])
    with pytest.raises(ValueError, match='no-such-command'):
        schedule.prepare(['no-such-command'])
    schedule.prepare(
        ['python -c "import sys, os; assert os.path.isdir(sys.argv[1])" {root}/configs']
    )
