"""Study files, and runs that take milliseconds."""

import time
from pathlib import Path

import yaml

from mmela.studies.run import make_jobs
from mmela.studies.study import read_study

TOOL = Path(__file__).with_name('train_tool.py')
CONFIG = """
train_cfg = dict(by_epoch=True, max_epochs=3)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
custom_hooks = [dict(type='SomeHook', policy=dict(gamma=0.5))]
die_at = 0
fail_at = 0
hold = ''
factor = 31
"""
STUDY = dict(
    name='tiny',
    title='A tiny study',
    text='What is asked.',
    metric='accuracy/top1',
    seeds=[0, 1],
    variants=dict(
        plain=dict(config='tiny.py'),
        other=dict(config='tiny.py', options={'factor': 5}),
    ),
    compare=[['other', 'plain']],
)


def write_study(folder, config=CONFIG, **changes):
    """Write a study file and its config; a change to None removes the key."""
    content = {k: v for k, v in {**STUDY, **changes}.items() if v is not None}
    (folder / 'tiny.py').write_text(config)
    path = folder / 'tiny.yml'
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def tiny_jobs(folder, out='out', seeds=(0,), **changes):
    """Create the runs of a study that uses the stand-in for training."""
    study = read_study(write_study(folder, seeds=list(seeds), **changes))
    return study, make_jobs(study, folder / out, list(seeds), str(TOOL))


def processes(job):
    """Ids of a run's training process and its parent."""
    return tuple(map(int, (job.folder / 'process').read_text().split()))


def wait_for(condition):
    """Wait until another process makes a condition true."""
    end = time.time() + 120
    while not condition():
        assert time.time() < end, 'nothing happens'
        time.sleep(0.02)


def is_gone(pid):
    """Whether a process has ended, even if nobody has collected its exit code."""
    status = Path(f'/proc/{pid}/stat')
    return (
        not status.exists() or status.read_text().rpartition(')')[2].split()[0] == 'Z'
    )
