"""Thousands of damaged records, logs, configs and checkpoints, each read and used.

A file is damaged in one of two ways: a value, key or list in it is replaced, removed,
renamed or repeated; or its bytes are cut, changed, repeated or emptied. Its reader must
succeed, or fail with a one-line error that names the file, and write nothing.

A test runs this; for larger counts, run:
  python -m tests.helpers.record_fuzz SEED COUNT [READER ...]
"""

import copy
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import yaml
from mmengine.config import Config

from mmela.analysis.records import BeforeAfter, read_measurement, read_record
from mmela.analysis.work_dir import Run
from mmela.convert.slim import slim_network
from mmela.engine.tables import decision_table
from mmela.hooks.saved_pruning import SavedPruning
from mmela.pruning import PruningReport
from mmela.structure import prune
from mmela.studies.results import agreements, collect, write_tables
from mmela.studies.run import RECORD, Attempt, Machine, Record
from mmela.studies.study import read_study
from mmela.visualization.decision_plots import known_policy
from tests.helpers.checkpoint_fuzz import damage as damage_bytes
from tests.helpers.measurements import SMALL, write_measurement
from tests.helpers.studies import tiny_jobs, write_study
from tests.helpers.work_dirs import make_work_dir

NAN = float('nan')
VALUES = [None, True, False, 0, -1, 1, 3, 1.5, -0.5, 1e308, 10**30, NAN, float('inf')]
VALUES += ['', 'a', '1', '../../x', '\x1b[31m', '<b>', [], {}, [1, 2], {'a': 1}, ['a']]


def places(value, found):
    """List the containers in a value, with their keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        found.append((value, key))
        if isinstance(item, (dict, list)):
            places(item, found)
    return found


def damage_values(rng, content):
    """Change a few values, keys or lists of nested plain values."""
    content = [copy.deepcopy(content)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place, key = rng.choice(places(content, []))
        choice = rng.randrange(6)
        if choice < 3:
            place[key] = copy.deepcopy(rng.choice(VALUES))
        elif choice == 3 and place is not content:
            del place[key]
        elif choice == 4 and isinstance(place, dict):
            place[rng.choice(['', 'x', f'{key}s', str(key).upper()])] = place.pop(key)
        else:
            other, name = rng.choice(places(content, []))
            place[key] = copy.deepcopy(other[name])
    return content[0]


def damaged_text(rng, path, load, dump):
    """Damage the values or the bytes of a text file."""
    content = path.read_bytes()
    if rng.random() < 0.6:
        text = dump(damage_values(rng, load(content.decode())))
        content = text.encode('utf-8', 'surrogatepass')
    elif rng.random() < 0.1:
        content = rng.choice(
            [b'', b'\xff\xfe\0', b'[' * 100_000, b'null', b'{}', b'[]']
        )
    else:
        content = damage_bytes(rng, content)
    path.write_bytes(content)


def damaged_json(rng, path):
    damaged_text(rng, path, json.loads, json.dumps)


def damaged_lines(rng, path):
    def load(text):
        return [json.loads(line) for line in text.splitlines()]

    def dump(lines):
        lines = lines if isinstance(lines, list) else [lines]
        return '\n'.join(map(json.dumps, lines))

    damaged_text(rng, path, load, dump)


# -- readers: write intact files to a folder, damage one and return it, read it ------


class Decisions:
    """pruning.json of this version and of version 0.1."""

    def make(self, folder):
        make_work_dir(folder)
        report = json.loads((folder / 'pruning.json').read_text())
        old = dict(hook=report['hook'], prunings=copy.deepcopy(report['decisions']))
        for decision in old['prunings']:
            for layer in decision['layers']:
                layer['kl'], layer['skip'] = (
                    layer.pop('divergence'),
                    layer.pop('pruned'),
                )
        (folder / 'old.json').write_text(json.dumps(old))

    def damage(self, rng, folder):
        path = folder / rng.choice(['pruning.json', 'old.json'])
        damaged_json(rng, path)
        return path

    def read(self, path):
        report = PruningReport.read(path)
        for decision in report.decisions:
            decision_table(decision.layers)
            known_policy(decision)
            assert decision.warning is None or '\n' not in decision.warning
        report.write(path.with_name('again.json'))
        assert PruningReport.read(path.with_name('again.json')) == report


class Logs:
    """Logs of a run."""

    def make(self, folder):
        make_work_dir(folder)

    def damage(self, rng, folder):
        path = folder / rng.choice(['20260102_030405/vis_data/scalars.json'] * 2)
        damaged_lines(rng, path)
        return path

    def read(self, path):
        run = Run(path.parents[2])
        run.step_times(), run.parameters(), run.best('coco/bbox_mAP')


class Studies:
    """Records, logs and decisions of a study's runs."""

    def make(self, folder):
        self.study, self.jobs = tiny_jobs(folder, seeds=(0, 1), metric='coco/bbox_mAP')
        machine = Machine('Some CPU', 2, None, '2', '0', 'r')
        for job in self.jobs:
            make_work_dir(job.folder)
            attempts = [Attempt(1e9, machine, 1, seconds, 0) for seconds in (5.0, 6.0)]
            job.write(Record(job.settings, None, True, attempts))

    def damage(self, rng, folder):
        path = rng.choice(self.jobs).folder / rng.choice(
            [RECORD, RECORD, 'pruning.json']
        )
        damaged_json(rng, path)
        return path

    def read(self, path):
        for job in self.jobs:
            job.changes(), job.checkpoint(), job.is_complete()
        runs, layers = collect(self.study, self.jobs)
        write_tables(runs, layers, path.parent / 'tables' / 'x.csv')
        for name in self.study.variants:
            agreements(layers, name)


class StudyFiles:
    """Study files."""

    def make(self, folder):
        write_study(folder, text='What is asked.', prepare=['true'])

    def damage(self, rng, folder):
        path = folder / 'tiny.yml'
        damaged_text(rng, path, yaml.safe_load, yaml.safe_dump)
        return path

    def read(self, path):
        read_study(path)


class Measurements:
    """layer_attention.json."""

    def make(self, folder):
        write_measurement(folder, 1, SMALL)

    def damage(self, rng, folder):
        path = folder / 'layer_attention' / 'epoch_1' / 'layer_attention.json'
        damaged_json(rng, path)
        return path

    def read(self, path):
        read_measurement(path)


class Comparisons:
    """before_after.json."""

    SIDE = dict(
        checkpoint='a.pth',
        epoch=1,
        iteration=3,
        active=2,
        attentions=3,
        mean=0.5,
        per_class=[dict(label=0, objects=4, value=0.5, curve=[0.1, 0.2])],
    )

    def make(self, folder):
        content = dict(
            format=1,
            stamp=[1, 'a'],
            kind='classes',
            note='',
            images=3,
            total=3,
            classes=['a', 'b'],
            sides=dict(before=self.SIDE, after=self.SIDE),
            shown=[dict(image='x.png', picture='x', truth=[0], before=[(0, 0.5)])],
        )
        (folder / 'before_after.json').write_text(json.dumps(content))

    def damage(self, rng, folder):
        damaged_json(rng, folder / 'before_after.json')
        return folder / 'before_after.json'

    def read(self, path):
        read_record(path, BeforeAfter, 'the report')


class Network:
    """A pruned classifier, its config and a checkpoint of its training."""

    NAMES = ('slim.py', 'x.pth')

    def make(self, folder):
        from mmpretrain.registry import MODELS

        config = folder / 'slim.py'
        blocks = [['layer1.0', '!layer1.1'], ['layer2.0', 'layer2.1']]
        backbone = dict(
            type='ELAResNet',
            depth=18,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(1,),
            stem_channels=4,
            base_channels=4,
            layer_attention=dict(type='MRLABase', head_dim=4),
            blocks=blocks,
        )
        head = dict(type='LinearClsHead', in_channels=8, num_classes=2)
        model = dict(type='ImageClassifier', backbone=backbone, head=head)
        neck = dict(type='GlobalAveragePooling')
        Config(dict(default_scope='mmpretrain', model=dict(model, neck=neck))).dump(
            config
        )
        network = MODELS.build(Config.fromfile(config).model)
        prune(network, ['backbone.layer2.1'])
        torch.save(dict(meta={}, state_dict=network.state_dict()), folder / 'x.pth')

    def damage(self, rng, folder):
        path = folder / 'slim.py'
        if rng.random() < 0.5:
            # Only values, because the bytes of a config are code
            cfg = Config.fromfile(path).to_dict()
            cfg = damage_values(rng, cfg)
            lines = cfg.items() if isinstance(cfg, dict) else [('model', cfg)]
            text = ''.join(f'{key} = {value!r}\n' for key, value in lines)
            path.write_text(text.replace('inf', '1e999').replace('nan', 'None'))
        else:
            path = folder / 'x.pth'
            path.write_bytes(damage_bytes(rng, path.read_bytes()))
        return path

    def read(self, path):
        folder = path.parent
        slim_network(folder / 'slim.py', folder / 'x.pth', size=16)


class Checkpoints:
    """State of the pruning hook in a checkpoint."""

    SETTINGS = dict(windows=[(1, 1), (3, 3)], by_epoch=True, keep_value=False)

    def make(self, folder):
        decisions = make_work_dir(folder)
        self.record = dict(
            history=[decision.to_dict() for decision in decisions],
            random_start={'backbone.layer1.1.layer_attn': torch.ones(6)},
            window=dict(
                window=[3, 4],
                put_off=0,
                done=3,
                sums=dict(
                    reduction='mean_kl',
                    eps=1e-8,
                    attentions=dict(layer1=['a', 'b']),
                    sums=dict(layer1=torch.ones(3).double()),
                ),
            ),
        )

    def damage(self, rng, folder):
        torch.save(damage_values(rng, self.record), folder / 'x.pth')
        return folder / 'x.pth'

    def read(self, path):
        try:
            SavedPruning.read(torch.load(path), self.SETTINGS)
        except ValueError as error:  # the hook adds the file name
            raise ValueError(f'{path}: {error}') from error


READERS = {
    kind.__name__: kind
    for kind in (Decisions, Logs, Studies, StudyFiles, Measurements, Comparisons)
    + (Network, Checkpoints)
}


def try_files(name, seed, count):
    """Damage and read files.

    Args:
        name (str): Name in :data:`READERS`.
        seed (int): Seed of the damage.
        count (int): Number of files.

    Returns:
        Counter: Numbers of files read and rejected.

    Raises:
        AssertionError: If reading ends in any other way; the message has the number of
            the file.
    """
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as root:
        reader, sound = READERS[name](), Path(root, 'sound')
        folder = Path(root, 'damaged')
        folder.mkdir()
        reader.make(folder)
        shutil.copytree(folder, sound)
        for case in range(count):
            shutil.rmtree(folder)
            shutil.copytree(sound, folder)
            path = reader.damage(random.Random(f'{name}-{seed}-{case}'), folder)
            before = sorted(folder.rglob('*'))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    reader.read(path)
            except (OSError, ValueError, SystemExit) as error:
                says = str(error)
                assert str(path) in says or path.name in says, f'{case}: {says}'
                assert '\n' not in says and says.isprintable(), f'{case}: {says!r}'
                assert sorted(folder.rglob('*')) == before, f'{case}: files are left'
                outcomes['refused'] += 1
            except Exception as error:
                kept = Path(tempfile.gettempdir(), f'{name}-{seed}-{case}{path.suffix}')
                shutil.copy(path, kept)
                raise AssertionError(f'{case}: {kept}: {error!r}') from error
            else:
                outcomes['read'] += 1
    return outcomes


if __name__ == '__main__':
    total = 0
    for reader_name in sys.argv[3:] or READERS:
        found = try_files(reader_name, int(sys.argv[1]), int(sys.argv[2]))
        total += sum(found.values())
        print(reader_name, dict(found), flush=True)
    print(total, 'files')
