"""One run: what there is of it, and the process that trains it."""

import json
import random
import threading
import zipfile

import msgspec
import pytest
from filelock import FileLock

from mmela.studies import train as training
from mmela.studies.run import LOG, RECORD, Record, read_record
from mmela.studies.study import Start
from mmela.studies.train import LOCK, Limits, train
from tests.helpers.studies import is_gone, processes, tiny_jobs, wait_for

ONCE = Limits(retries=0)


@pytest.fixture
def job(tmp_path):
    return tiny_jobs(tmp_path)[1][0]


def checkpoint(folder, number, whole=True):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'epoch_{number}.pth'
    if whole:
        with zipfile.ZipFile(path, 'w') as file:
            file.writestr('state', '5')
    else:
        path.write_bytes(b'PK\x03\x04 half a file')
    return path


def test_jobs_start_after_what_they_start_from(tmp_path):
    start = dict(variant='base', checkpoint='epoch_1.pth', how='load')
    _, jobs = tiny_jobs(
        tmp_path,
        seeds=(0, 3),
        variants=dict(
            ela=dict(config='tiny.py', start=start), base=dict(config='tiny.py')
        ),
        compare=[],
    )
    names = ['base seed 0', 'ela seed 0', 'base seed 3', 'ela seed 3']
    assert [job.name for job in jobs] == names
    assert jobs[1].after == jobs[0].work_dir and jobs[3].after == jobs[2].work_dir
    assert jobs[2].work_dir == str(tmp_path / 'out' / 'tiny' / 'base' / 'seed_3')
    assert jobs[2].options == ('randomness.deterministic=True', 'randomness.seed=3')
    assert jobs[2].settings['randomness'] == {'deterministic': True, 'seed': 3}


def test_trains(job):
    """Three epochs of state <- 31 state + seed, from seed + 1."""
    assert train(job, Limits(threads=2)) is None
    assert job.done and job.is_complete()
    assert job.results().metrics[3]['accuracy/top1'] == 31**3 % 1009 / 10.09
    record = read_record(job.work_dir)
    assert record.settings == job.settings and record.start is None
    (attempt,) = record.attempts
    assert attempt.exit == 0 and attempt.threads == 2
    assert 0 < attempt.seconds < 60
    assert attempt.machine.cores >= 1
    assert job.progress() == (1.0, 'epoch 3/3, 1/1')
    # Nothing is started for what is done
    assert train(job, ONCE) is None and len(job.record.attempts) == 1


def test_threads_and_device(job, tmp_path):
    tool = tmp_path / 'show.py'
    names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')
    tool.write_text(f'import os\nprint([os.environ[n] for n in {names}])\n')
    job = type(job)(**{**vars(job), 'tool': str(tool)})
    assert train(job, Limits(threads=3), '7') is None
    assert "['3', '3', '7']" in (job.folder / LOG).read_text()


def test_goes_on_from_the_last_whole_checkpoint(job):
    checkpoint(job.folder, 1)
    checkpoint(job.folder, 2, whole=False)
    (job.folder / 'epoch_x.pth').touch()
    assert job.checkpoint().name == 'epoch_1.pth'
    assert train(job, ONCE) is None
    # Two more epochs from 5
    assert job.results().metrics[3]['accuracy/top1'] == 31**2 * 5 % 1009 / 10.09


def test_killed_in_its_last_validation(job):
    """The last epoch is trained again, as its validation is missing."""
    checkpoint(job.folder, 2)
    checkpoint(job.folder, 3)
    assert not job.is_complete() and job.checkpoint().name == 'epoch_2.pth'


def test_killed_before_it_was_noted(job):
    assert train(job, ONCE) is None
    record = job.record
    record.done, record.attempts[0].seconds = False, None
    job.write(record)
    assert train(job, ONCE) is None and job.done
    (attempt,) = job.record.attempts
    assert attempt.seconds > 0


@pytest.mark.parametrize('how, steps', [('load', 3), ('resume', 2)])
def test_starts_from_another(tmp_path, how, steps):
    start = dict(variant='base', checkpoint='epoch_1.pth', how=how)
    _, (base, other) = tiny_jobs(
        tmp_path,
        variants=dict(
            base=dict(config='tiny.py'), other=dict(config='tiny.py', start=start)
        ),
        compare=[],
    )
    with pytest.raises(FileNotFoundError, match='other seed 0 starts from .*epoch_1'):
        train(other, ONCE)
    checkpoint(base.folder, 1)
    assert train(other, ONCE) is None
    metric = other.results().metrics[3]['accuracy/top1']
    assert metric == 31**steps * 5 % 1009 / 10.09
    # From its own checkpoint, once it has one
    other.write(msgspec.structs.replace(other.record, done=False))
    (other.folder / 'epoch_3.pth').unlink()
    assert other.checkpoint().parent == other.folder
    assert train(other, ONCE) is None
    assert other.results().metrics[3]['accuracy/top1'] == metric


def test_one_process_at_a_time(job, monkeypatch):
    monkeypatch.setattr(training, 'PATIENCE', 0.1)
    job.folder.mkdir(parents=True)
    with FileLock(job.folder / LOCK):
        assert train(job, ONCE) == f'another process is training in {job.folder}'
    assert train(job, ONCE) is None


def test_a_run_that_hangs(tmp_path):
    """It is ended by the time limit, and what it has stays."""
    _, (job, _) = tiny_jobs(tmp_path, options={'hold': str(tmp_path / 'go')})
    reason = train(job, Limits(retries=1, hours=2 / 3600))
    assert reason.startswith('the time limit; the end of ')
    assert [a.exit for a in job.record.attempts] == [-9, -9]
    assert all(a.timed_out and 2 <= a.seconds < 60 for a in job.record.attempts)
    assert is_gone(processes(job)[0]) and not job.done
    (tmp_path / 'go').touch()
    assert train(job, ONCE) is None and len(job.record.attempts) == 3
    assert (job.folder / LOG).read_text().count('Epoch(train)  [1]') == 1


def test_a_run_that_is_stopped(tmp_path):
    _, (job, _) = tiny_jobs(tmp_path, options={'hold': 'never'})
    stop = threading.Event()
    thread = threading.Thread(target=train, args=(job, Limits(), None, stop))
    thread.start()
    wait_for((job.folder / 'epoch_1.pth').exists)
    stop.set()
    thread.join()
    assert is_gone(processes(job)[0])
    assert [a.exit for a in job.record.attempts] == [-9]


def test_changed_settings(tmp_path):
    _, (job, _) = tiny_jobs(tmp_path)
    assert job.changes() == []
    assert train(job, ONCE) is None
    assert job.changes() == []
    changed = dict(options={'custom_hooks.0.policy.gamma': 0.3, 'die_at': 9})
    _, (job, _) = tiny_jobs(tmp_path, **changed)
    assert sorted(job.changes()) == [
        'custom_hooks.0.policy.gamma: 0.5 -> 0.3',
        'die_at: 0 -> 9',
    ]
    _, (job, _) = tiny_jobs(tmp_path, options={'factor': 31})
    assert job.changes() == []


def test_changed_before_anything_was_trained(tmp_path):
    """Then nothing is lost."""
    _, (job, _) = tiny_jobs(tmp_path, options={'fail_at': 1})
    assert train(job, ONCE).startswith('exit code 3; ')
    _, (job, _) = tiny_jobs(tmp_path)
    assert job.changes() == []


def test_of_something_else(job):
    checkpoint(job.folder, 1)
    assert 'no study made it' in job.changes()[0]


@pytest.mark.parametrize(
    'text, share, shown',
    [
        ('', 0, 'starting'),
        ('- Epoch(train)   [2][ 50/100]  lr: 1', 0.5, 'epoch 2/3, 50/100'),
        ('- Epoch(train) [1][10/100]\n- Epoch(val) [1][3/3]', 0.1 / 3, 'epoch 1/3'),
        ('- Iter(train) [ 300/1000]  lr: 1', 0.3, 'iteration 300/1000'),
    ],
)
def test_progress(job, text, share, shown):
    job.folder.mkdir(parents=True)
    (job.folder / LOG).write_text(text)
    found, told = job.progress()
    assert found == pytest.approx(share) and told.startswith(shown)


def test_the_record_is_whole_or_not_there(job):
    job.folder.mkdir(parents=True)
    job.write(Record(done=True, start=Start('base', 'epoch_1.pth', 'load')))
    content = json.loads((job.folder / RECORD).read_text())
    assert content['done'] and content['start']['how'] == 'load'
    assert [p.name for p in job.folder.iterdir()] == [RECORD]
    assert job.record.start == Start('base', 'epoch_1.pth', 'load')


@pytest.mark.parametrize(
    'text, name',
    [
        ('', 'Expecting value'),
        ('[]', 'object'),
        ('{"done": 1}', '$.done'),
        ('{"attempts": [{"started": 1}]}', '$.attempts[0]'),
        ('{"attempts": {}}', '$.attempts'),
        ('{"settings": 3}', '$.settings'),
        ('{"start": {"variant": "a", "checkpoint": "b", "how": "c"}}', '$.start.how'),
        ('[' * 100000, 'RecursionError'),
    ],
)
def test_a_damaged_record_names_its_file(job, text, name):
    job.folder.mkdir(parents=True)
    (job.folder / RECORD).write_text(text)
    with pytest.raises(ValueError) as error:
        read_record(job.work_dir)
    assert str(error.value).startswith(
        f'{job.folder / RECORD} is not a record of a run'
    )
    assert name in str(error.value) or name in repr(error.value.__cause__)
    assert '\n' not in str(error.value)


def test_any_damage_of_a_record(job):
    """It is read, or refused by the name of its file."""
    assert train(job, ONCE) is None
    path = job.folder / RECORD
    whole, random_ = path.read_bytes(), random.Random(0)
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(random_.randint(1, 3)):
            place = random_.randrange(len(damaged))
            damaged[place : place + random_.randint(0, 9)] = random_.randbytes(
                random_.randint(0, 3)
            )
        path.write_bytes(damaged)
        try:
            record = read_record(job.work_dir)
        except ValueError as error:
            assert str(error).startswith(f'{path} is not a record')
        else:
            assert isinstance(record.done, bool)
            assert all(a.started >= 0 and a.machine.cpu for a in record.attempts)


def test_goes_on_with_other_settings(tmp_path):
    """What it began with stays noted, so it is not taken for the new ones."""
    _, (job, _) = tiny_jobs(tmp_path, options={'fail_at': 2})
    assert train(job, ONCE).startswith('exit code 3; ')
    _, (job, _) = tiny_jobs(tmp_path)
    assert job.changes() == ['fail_at: 2 -> 0']
    assert train(job, ONCE) is None
    assert job.done and job.changes() == ['fail_at: 2 -> 0']
