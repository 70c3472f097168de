"""Tables, statistics and the page."""

import csv
import dataclasses
import itertools
import json
import shutil

import pytest

from mmela.studies.page import write_page
from mmela.studies.results import (
    agreements,
    collect,
    difference,
    expected_jaccard,
    spread,
    write_tables,
)
from mmela.studies.run import Attempt, Machine, Record
from tests.helpers.studies import tiny_jobs
from tests.helpers.work_dirs import make_work_dir


def test_spread():
    """t of 2 degrees of freedom: 4.30265 at 97.5 %, and sqrt(12) has p 0.0742."""
    s = spread([1, 2, 3])
    assert (s.n, s.mean, s.deviation) == (3, 2, 1)
    half = 4.30265 / 3**0.5
    assert (s.low, s.high) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert s.p == pytest.approx(0.0742, abs=1e-4)


def test_spread_of_few():
    assert spread([]) == (0, None, None, None, None, None)
    assert spread([5]) == (1, 5, None, None, None, None)
    assert spread([5, 5]) == (2, 5, 0, 5, 5, 0)
    assert spread([0.0, 0.0]).p is None


def row(variant, seed, final):
    return dict(variant=variant, seed=seed, final=final)


def test_differences_are_paired():
    """Of the seeds that both have: 1, 2 and 3."""
    runs = [row('a', 0, 9.0), row('b', 1, 10.0), row('b', 2, 20.0), row('b', 3, 30.0)]
    runs += [row('a', 1, 11.0), row('a', 2, 22.0), row('a', 3, 33.0), row('a', 4, 1.0)]
    runs += [row('b', 4, None)]
    assert difference(runs, 'a', 'b') == spread([1.0, 2.0, 3.0])


def brute_force(first, second, m, k):
    """The mean over all pairs of choices."""
    values = []
    for a in itertools.combinations(first, m):
        for b in itertools.combinations(second, k):
            values.append(len(set(a) & set(b)) / len(set(a) | set(b)))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    'first, second, m, k',
    [
        ('abcdef', 'abcdef', 2, 2),
        ('abcdef', 'abcdef', 1, 4),
        ('abcdef', 'abcdef', 6, 3),
        ('abcde', 'cdefgh', 3, 2),
        ('abc', 'def', 2, 2),
        ('abc', 'abc', 0, 2),
    ],
)
def test_jaccard_by_chance(first, second, m, k):
    both = len(set(first) & set(second))
    found = expected_jaccard(len(first), len(second), both, m, k)
    assert found == pytest.approx(brute_force(first, second, m, k))


def test_two_empty_choices_agree():
    assert expected_jaccard(4, 4, 4, 0, 0) == 1


def layers(seed, window, pruned, names='abcd', learned=True, values=None):
    return [
        dict(
            variant='ela',
            seed=seed,
            window=window,
            layer=name,
            divergence=None if i == 0 else (values or [0, 3, 2, 1])[i],
            baseline=[None, 0.7, 0.4, 0.3][i],
            pruned=name in pruned,
            learned=learned,
        )
        for i, name in enumerate(names)
    ]


def test_agreement():
    """Jaccard of {b}, {b}: 1, and of {b}, {b, c}: 1/2, twice."""
    rows = layers(0, 'epoch 1', 'b') + layers(1, 'epoch 1', 'b', learned=False)
    rows += layers(2, 'epoch 1-2', 'bc', values=[0, 0.7, 0.4, 0.3])
    rows += layers(0, 'epoch 4', '', 'acd')
    (first, second) = agreements(rows, 'ela')
    assert first.window == 'epoch 1, epoch 1-2'
    assert first.learned == [True, False, True]
    assert (first.pruned, first.candidates) == ([1, 1, 2], [3, 3, 3])
    assert first.jaccard == pytest.approx((1 + 0.5 + 0.5) / 3)
    chance = brute_force('bcd', 'bcd', 1, 1) + 2 * brute_force('bcd', 'bcd', 1, 2)
    assert first.chance == pytest.approx(chance / 3)
    # By hand: deviations 1, 0, -1 and 7/30, -2/30, -5/30
    by_hand = (12 / 30) / (2 * 78 / 900) ** 0.5
    assert first.correlation == pytest.approx([by_hand, by_hand, 1])
    assert second.window == 'epoch 4' and second.jaccard is None
    assert second.correlation == []  # of two
    assert agreements(rows, 'plain') == []


@pytest.fixture
def made(tmp_path):
    """Seed 0 of ela is done, seed 1 of it and plain have not run."""
    study, jobs = tiny_jobs(
        tmp_path,
        seeds=(0, 1),
        text='Why | this.',
        metric='coco/bbox_mAP',
        variants=dict(
            ela=dict(config='tiny.py', label='ELA $x$', paper=0.5),
            plain=dict(config='tiny.py'),
        ),
        compare=[['ela', 'plain']],
        options={'train_cfg.max_epochs': 4},  # as tests/helpers/work_dirs.py has
    )
    decisions = make_work_dir(jobs[0].folder)
    machine = Machine('Some CPU', 2, None, '2', '0', 'r')
    attempts = [Attempt(1e9, machine, 1, s, 0) for s in (5.0, 6.0)]
    jobs[0].write(Record(jobs[0].settings, None, True, attempts))
    return study, jobs, decisions


def test_tables(made, tmp_path):
    study, jobs, (first, second) = made
    runs, rows = collect(study, jobs)
    paths = write_tables(runs, rows, tmp_path / 'page' / 'tiny.csv')
    assert [p.name for p in paths] == ['tiny.csv', 'tiny_layers.csv']
    ela, plain, *_ = table = list(csv.DictReader(paths[0].open()))
    assert [r['variant'] for r in table] == ['ela', 'plain', 'ela', 'plain']
    # Of tests/helpers/work_dirs.py: 0.25 at the end, 0.3 in epoch 3
    assert (ela['final'], ela['coco/bbox_mAP']) == ('0.25', '0.25')
    assert float(ela['best']) == pytest.approx(0.3) and ela['best_at'] == '3'
    assert float(ela['coco/bbox_mAP_50']) == pytest.approx(0.8)
    assert int(ela['active']) == len(second.active)
    assert ela['attentions'] == '16'
    assert ela['step_times'] == '0.5 0.2083 0.125'  # 1/1, 1/2 and 1/3, 1/4 of 0.5
    assert (ela['wall_time'], ela['attempts']) == ('11.0', '2')
    assert (ela['cpu'], ela['gpu'], ela['revision']) == ('Some CPU', '', 'r')
    names = [name.split('.', 1)[1][: -len('.layer_attn')] for name in first.pruned]
    assert ela['pruned'].startswith(f'epoch 1: {" ".join(names)}; epoch 3: ')
    assert (plain['status'], plain['final'], plain['cpu']) == ('missing', '', '')
    detail = list(csv.DictReader(paths[1].open()))
    assert len(detail) == len(first.layers) + len(second.layers)
    for layer, found in zip(first.layers, detail):
        assert found['pruned'] == str(layer.pruned)
        for key in ('divergence', 'shape', 'own', 'baseline'):
            value = getattr(layer, key)
            assert found[key] == ('' if value is None else str(value))


def log_of(job):
    (log,) = job.folder.glob('*/vis_data/scalars.json')
    return log


@pytest.mark.parametrize('keep', [lambda step: step != 4, lambda step: step == 2])
def test_no_validation_at_the_end(made, tmp_path, keep):
    """An earlier one does not stand for it."""
    study, jobs, _ = made
    log = log_of(jobs[0])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [x for x in lines if 'coco/bbox_mAP' not in x or keep(x['step'])]
    log.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    runs, rows = collect(study, jobs)
    assert runs[0]['final'] is None and runs[0].get('coco/bbox_mAP') is None
    assert runs[0]['status'] == 'no final validation' and runs[0]['best'] > 0
    write_page(study, jobs, runs, rows, [], tmp_path / 'tiny.md', 'a')
    text = (tmp_path / 'tiny.md').read_text()
    assert 'ela seed 0 (no final validation)' in text


def test_metrics_do_not_take_the_place_of_columns(made, tmp_path):
    """Whatever a log calls them."""
    study, jobs, _ = made
    names = ['final', 'seed', 'status', 'variant', 'best', 'pruned', 'attempts', 'cpu']
    with open(log_of(jobs[0]), 'a') as log:
        log.write(json.dumps({**dict.fromkeys(names, 7.0), 'time': 1, 'step': 4}))
    runs, rows = collect(study, jobs)
    ela = runs[0]
    assert (ela['final'], ela['seed'], ela['status']) == (0.25, 0, 'done')
    assert (ela['variant'], ela['attempts'], ela['cpu']) == ('ela', 2, 'Some CPU')
    (path, _) = write_tables(runs, rows, tmp_path / 'tiny.csv')
    table = list(csv.DictReader(path.open()))
    assert table[0]['final'] == '0.25' and table[0]['metric final'] == '7.0'


def test_text_of_records_is_escaped(made, tmp_path):
    study, jobs, _ = made
    record = jobs[0].record
    bad = '<script>a</script> [b](c) *d* `e` | ![f](g)\n# h'
    record.attempts[-1].machine = Machine(bad, 1, bad, bad, bad, bad)
    record.settings['hold'] = bad
    jobs[0].write(record)
    runs, rows = collect(study, jobs)
    write_page(study, jobs, runs, rows, [], tmp_path / 'tiny.md', 'a')
    text = (tmp_path / 'tiny.md').read_text()
    for part in ('<script', '[b](', ' *d*', ' `e`', '![f]', '\n# h'):
        assert part not in text
    assert r'&lt;script&gt;a&lt;/script&gt; \[b\](c)' in text


@pytest.mark.parametrize(
    'names', [('b', 'a'), ('a', 'b'), ('20260101_1', '20251231_9')]
)
def test_order_of_starts(made, names):
    """By what they logged: clocks are set back, and zones differ."""
    _, jobs, _ = made
    log = log_of(jobs[0])
    folder, lines = log.parents[1], log.read_text().splitlines()
    whole = jobs[0].results()
    cut = next(i for i, line in enumerate(lines) if json.loads(line)['step'] > 20)
    for name, part in zip(names, (lines[: cut + 8], lines[cut:])):
        path = jobs[0].folder / name / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(part) + '\n')
    shutil.rmtree(folder)
    run = jobs[0].results()
    assert run.starts == list(names)
    assert run.training == whole.training and run.metrics == whole.metrics


def test_hidden_variants_are_not_missed(made, tmp_path):
    study, jobs, _ = made
    plain = dataclasses.replace(study.variants['plain'], hidden=True)
    study = dataclasses.replace(
        study, variants=dict(study.variants, plain=plain), compare=()
    )
    runs, rows = collect(study, jobs)
    write_page(study, jobs, runs, rows, [], tmp_path / 'tiny.md', 'python a.py')
    text = (tmp_path / 'tiny.md').read_text()
    assert 'Without a result: ela seed 1 (missing).' in text
    assert text.count('| plain |') == 1  # how it was made


def test_page(made, tmp_path):
    study, jobs, _ = made
    runs, rows = collect(study, jobs)
    paths = write_page(
        study, jobs, runs, rows, [], tmp_path / 'tiny.md', 'python tools/study.py a'
    )
    assert [p.name for p in paths] == ['tiny.md', 'tiny.png', 'tiny_dark.png']
    text = paths[0].read_text()
    assert text.startswith('# A tiny study\n\nWhy | this.\n')
    assert '| ELA $x$ | 1 | 0.2500 | – | – | 0.5 | 0.3000 |' in text
    assert '| step time (s) | time |' in text  # no memory on a CPU
    assert '| plain | 0 | – | – | – | – | – |' in text
    assert '| ELA $x$ − plain | 0 | – | – | – |' in text
    assert 'Without a result: plain seed 0 (missing), ela seed 1 (missing)' in text
    assert '| ELA $x$ | 0.2500 | – |' in text
    assert 'python tools/study.py a\n' in text and 'Some CPU, 2 cores, no GPU' in text
    assert 'run 2001-09-09' in text and 'Conclusion' not in text
    for word in ('nan', 'None', str(tmp_path)):
        assert word not in text


def test_step_times_have_a_range(made, tmp_path):
    """Of the seeds: of one there is none."""
    study, jobs, _ = made
    runs, rows = collect(study, jobs)
    second = dict(runs[0], seed=1, final=0.5, step_time=2 * runs[0]['step_time'])
    texts = []
    for some in (runs, [*runs, second]):
        path = tmp_path / 'tiny.md'
        write_page(study, jobs, some, rows, [], path, 'a')
        texts.append(path.read_text())
    one = runs[0]['step_time']
    assert f'| {one:.3f} |' in texts[0]
    assert f'| {1.5 * one:.3f} ({one:.3f} to {2 * one:.3f}) |' in texts[1]


def test_conclusion(made, tmp_path):
    """What a person wrote is in the file, so a page written again has it."""
    _, jobs, _ = made
    path = tmp_path / 'tiny.yml'
    path.write_text(path.read_text() + 'conclusion: It helps.\n')
    from mmela.studies.study import read_study

    study = read_study(path)
    for _ in range(2):
        runs, rows = collect(study, jobs)
        page = tmp_path / 'tiny.md'
        write_page(study, jobs, runs, rows, [], page, 'a')
        assert '## Conclusion\n\nIt helps.\n' in page.read_text()


def test_nothing_has_run(tmp_path):
    study, jobs = tiny_jobs(tmp_path)
    runs, rows = collect(study, jobs)
    assert rows == [] and [r['status'] for r in runs] == ['missing'] * 2
    paths = write_tables(runs, rows, tmp_path / 'tiny.csv')
    paths += write_page(study, jobs, runs, rows, paths, tmp_path / 'tiny.md', 'a')
    assert [p.name for p in paths] == ['tiny.csv', 'tiny.md']
