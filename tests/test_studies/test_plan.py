"""The plan: order, estimates, preparation."""

import pytest

from mmela.studies import plan as plans
from mmela.studies.plan import duration, estimates, plan
from mmela.studies.run import Record, select
from mmela.studies.train import Attempt, machine
from tests.helpers.studies import tiny_jobs

TINY = dict(config='tiny.py')


def done(job, *seconds):
    job.folder.mkdir(parents=True)
    attempts = [Attempt(0.0, machine(), 1, each, 0) for each in seconds]
    job.write(Record(done=True, attempts=attempts))


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
    assert list(plan(jobs, jobs, 2))[-1].startswith('remaining time unknown')
    done(jobs[0], 10.0, 20.0)
    return jobs


def test_estimates(timed):
    """10 s an epoch: of base; of a, which has two left, by what base takes."""
    _, a0, base1, a1 = timed
    seconds = estimates([a0, base1, a1], timed)
    assert seconds == {a0.work_dir: 20.0, base1.work_dir: 30.0, a1.work_dir: 20.0}
    done(a0, 8.0)  # 4 s for each of two
    assert estimates([a1], timed) == {a1.work_dir: 8.0}


def test_plan(timed):
    """70 s of work for two, and the longest run takes 30 s."""
    lines = list(plan(timed, timed, 2))
    assert lines[0].split() == ['base', 'seed', '0', 'done']
    assert lines[1].endswith('3 epochs, about 20 s, resume epoch_1.pth of base')
    assert lines[-2:] == ['1 of 4 runs done, 2 in parallel', 'about 35 s remaining']


@pytest.mark.parametrize(
    'seconds, text',
    [(12.4, '12 s'), (90, '2 min'), (3599, '1 h 00 min'), (86400, '24 h 00 min')],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_prepare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans.prepare(["python -c \"open('a b', 'w')\""])
    assert (tmp_path / 'a b').exists()
    with pytest.raises(ValueError, match='exit code 4'):
        plans.prepare(['python -c "raise SystemExit(4)"'])
    with pytest.raises(ValueError, match='no-such-command'):
        plans.prepare(['no-such-command'])
    plans.prepare(
        ['python -c "import sys, os; assert os.path.isdir(sys.argv[1])" {root}/configs']
    )
