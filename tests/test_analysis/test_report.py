"""The report on a run: synthetic work directories, and one real run."""

import base64
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import beta

from mmela.analysis import make_report, summarize
from mmela.analysis.before_after_plots import read_before_after
from mmela.analysis.run_plots import timeline_plot
from mmela.analysis.work_dir import Run
from mmela.layers import AttentionState
from mmela.layers.state import encode, encode_text
from mmela.pruning import LayerDecision, PruningDecision, build_policy
from mmela.visualization.decision_plots import _spread, kl_plot, known_policy
from mmela.visualization.drawing import LIGHT
from tests.helpers.measurements import stage, write_measurement
from tests.helpers.pages import Page, check_offline
from tests.helpers.runs import decisions
from tests.helpers.toy import toy_config, train
from tests.helpers.work_dirs import (
    CONFIG,
    POLICY,
    make_work_dir,
    pruning,
    write_decisions,
    write_log,
)

TOOL = Path(__file__).resolve().parents[2] / 'tools/analysis/report.py'


def check_pictures(work_dir):
    paths = sorted((work_dir / 'pictures').iterdir())
    for path in paths:
        with Image.open(path) as image:
            image.verify()
            assert image.format == 'PNG'
        assert path.stat().st_size < 200_000
    return {path.name for path in paths}


@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('synthetic')
    decisions = make_work_dir(work_dir)
    assert make_report(work_dir) == work_dir / 'report.html'
    return work_dir, decisions


def test_numbers(synthetic):
    work_dir, decisions = synthetic
    path = work_dir / 'report.html'
    page = Page(path)
    check_offline(page)
    rows = [tuple(row) for row in page.rows]
    for decision in decisions:
        assert decision.pruned and len(decision.active) > 3
        for layer in decision.layers:
            numbers = [
                '' if value is None else f'{value:.{digits}g}'
                for value, digits in (
                    (layer.divergence, 4),
                    (layer.shape, 3),
                    (layer.own, 3),
                    (layer.baseline, 3),
                    (layer.normalized, 4),
                    (layer.mapped, 4),
                )
            ]
            name = ('✕ ' if layer.pruned else '') + layer.name[
                len('backbone.') : -len('.layer_attn')
            ]
            assert (name, *numbers, layer.reason) in rows
    assert ('coco/bbox_mAP', '0.25', '0.3', 'epoch 3') in rows
    assert ('coco/bbox_mAP_50', '0.8', '0.8', 'epoch 4') in rows
    assert ('coco/bbox_mAP_l', '-1', '', '') in rows
    counts = [16] + [len(decision.active) for decision in decisions]
    # Per epoch: 0.5 / 1; 0.5 / 2 and 0.5 / 3; 0.5 / 4
    assert ('1 to 20', str(counts[0]), '0.5', '0.5 to 0.5', '0.01', '4') in rows
    # Four times 0.25 and four times 0.1667
    half = '0.1667 to 0.25'
    assert ('21 to 60', str(counts[1]), '0.2083', half, '0.01', '8') in rows
    half = '0.125 to 0.125'
    assert ('61 to 80', str(counts[2]), '0.125', half, '0.01', '4') in rows
    assert ('layer attentions', '176', str(11 * counts[2])) in rows
    assert ('whole network', '211', str(35 + 11 * counts[2])) in rows
    text = ' '.join(page.text.split())
    for expected in (
        'Started 2026-01-02 03:04:05',
        'Trained 4 of 4 epochs',
        'Checkpoint epoch_4.pth',
        '0.2083 s (middle half 0.1667 to 0.25, 8 logged values) after; no',
        "gamma=0.5, alpha=2, beta=5, mu=0.2, mapping='beta')",
        'Reduction: mean_kl; eps 1e-08; a pruned attention is removed',
        'Windows: 1 to 1, 3 to 3 (epochs)',
        CONFIG.split()[-1],
    ):
        assert expected in text, expected
    assert '<script' not in path.read_text()
    names = {
        'metrics',
        'loss',
        'timeline',
        'kl_epoch_1',
        'kl_epoch_3',
        'mapping_epoch_1',
        'mapping_epoch_3',
    }
    assert check_pictures(work_dir) == {
        f'{n}{theme}.png' for n in names for theme in ('', '_dark')
    }
    pictures = [s for s in page.sources if s.startswith('data:image/png')]
    assert len(pictures) == 2 * len(names)
    for source in pictures:
        data = re.fullmatch('data:image/png;base64,(.*)', source)[1]
        assert base64.b64decode(data).startswith(b'\x89PNG')


def test_summary(synthetic):
    work_dir, decisions = synthetic
    text = summarize(work_dir)
    for decision in decisions:
        assert (
            f'After epoch {decision.window[1]}: {len(decision.layers)} '
            f'-> {len(decision.active)} active'
        ) in text
        for layer in decision.layers:
            assert layer.reason in text
    assert (
        'Epoch 3: coco/bbox_mAP 0.3  coco/bbox_mAP_50 0.6 (best coco/bbox_mAP)' in text
    )
    assert 'Epoch 4: coco/bbox_mAP 0.25  coco/bbox_mAP_50 0.8 (last)' in text
    for name in (
        'epoch_4.pth',
        'best_coco_bbox_mAP_epoch_3.pth',
        'pruning.json',
        'report.html',
        'pictures',
    ):
        assert str(work_dir / name) in text
    assert max(map(len, text.splitlines())) <= max(120, len(str(work_dir)) + 60)


def test_no_global_figure(synthetic):
    pyplot = sys.modules.get('matplotlib.pyplot')
    assert pyplot is None or not pyplot.get_fignums()


def test_without_pruning_metrics_config_and_checkpoint(tmp_path):
    write_log(tmp_path, '20260102_030405', [1], metrics=False)
    page = Page(make_report(tmp_path))
    check_offline(page)
    assert 'nothing was pruned' in page.text
    assert 'no validation metrics' in page.text
    assert 'no dumped config' in page.text
    assert 'no checkpoint' in page.text
    assert check_pictures(tmp_path) == {'loss.png', 'loss_dark.png'}
    text = summarize(tmp_path)
    assert 'no pruning decision' in text
    assert 'no validation metrics' in text
    assert 'pruning.json' not in text and 'None' not in text


def test_resumed_run_is_one_run(tmp_path):
    """What is done again replaces what was there."""
    write_log(tmp_path, '20260102_000000', range(1, 4), loss=4.0)
    write_log(tmp_path, '20260103_000000', range(2, 5), loss=40.0)
    # Stopped before its first log, and a validation alone
    write_log(tmp_path, '20260104_000000', [])
    (tmp_path / '20260105_000000' / 'vis_data').mkdir(parents=True)
    (tmp_path / '20260105_000000' / 'vis_data' / 'scalars.json').write_text(
        json.dumps({'coco/bbox_mAP': 0.9, 'time': 1.0, 'step': 0})
    )
    run = Run(tmp_path)
    assert run.starts == ['20260102_000000', '20260103_000000']
    assert list(run.losses) == list(range(5, 81, 5))
    assert run.losses[20] == 4.0 and run.losses[25] == 20.0
    assert list(run.metrics) == [1, 2, 3, 4]
    assert 'resumed 1 time' in Page(make_report(tmp_path)).text


def test_abandoned_part_and_earlier_run_are_left_out(tmp_path):
    write_log(tmp_path, '20260102_000000', range(1, 5))
    write_log(tmp_path, '20260103_000000', [2])
    assert max(Run(tmp_path).training) == 40
    assert list(Run(tmp_path).metrics) == [1, 2]
    write_log(tmp_path, '20260104_000000', [1])
    assert Run(tmp_path).starts == ['20260104_000000']
    assert list(Run(tmp_path).metrics) == [1]


def test_iteration_based_and_hierarchical_log(tmp_path):
    path = tmp_path / '20260102_000000' / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    records = [
        {'train/loss': 3.0, 'train/time': 0.5, 'iter': 10, 'step': 10},
        {'val/accuracy/top1': 55.5, 'val/time': 1.0, 'step': 10},
    ]
    path.write_text('\n'.join(map(json.dumps, records)))
    run = Run(tmp_path)
    assert run.unit == 'iteration' and run.losses == {10: 3.0}
    assert run.metrics == {10: {'accuracy/top1': 55.5}}
    assert run.step_times()[0].times.median == 0.5
    assert 'Iteration 10: accuracy/top1 55.5' in summarize(tmp_path)
    check_offline(Page(make_report(tmp_path)))


@pytest.mark.parametrize(
    'policy',
    [
        dict(type='FixedCount', count=2),
        dict(type='Threshold'),
        dict(type='QuantileMapping'),
        dict(type='EBQM', mapping='sigmoid', scope='stage'),
    ],
)
def test_other_policies(tmp_path, policy):
    make_work_dir(tmp_path, policy=policy, spread=4.0)
    page = Page(make_report(tmp_path))
    check_offline(page)
    mapped = 'mapping_epoch_1.png' in check_pictures(tmp_path)
    assert mapped == (policy['type'] != 'FixedCount')


def test_deep_network_and_unknown_policy(tmp_path):
    """Names stay apart, pictures small; the curve needs a known policy."""
    policy = dict(POLICY, gamma=1.0)
    make_work_dir(tmp_path, dict(layer1=3, layer2=8, layer3=36, layer4=3), policy)
    report = json.loads((tmp_path / 'pruning.json').read_text())
    for decision in report['decisions']:
        decision['policy'] = dict(type='SomebodyElses', mu=0.2)
    (tmp_path / 'pruning.json').write_text(json.dumps(report))
    make_report(tmp_path)
    check_pictures(tmp_path)


@pytest.mark.parametrize('shape', [0.0, 0.1])
def test_says_where_nothing_can_repeat_another(tmp_path, shape):
    make_work_dir(tmp_path, dict(layer1=2, layer2=2), POLICY)
    report = json.loads((tmp_path / 'pruning.json').read_text())
    for decision in report['decisions']:
        for layer in decision['layers']:
            if layer['divergence'] is not None:
                layer['shape'] = shape
    (tmp_path / 'pruning.json').write_text(json.dumps(report))
    found = 'is the second of its stage' in make_report(tmp_path).read_text('utf-8')
    assert found == (shape == 0)


def test_known_policy():
    # Beta(2, 5) CDF at 0.5: 1 - 0.5**6 - 6 * 0.5**6
    layer = LayerDecision('a', 'b', 1.0, normalized=0.5, mapped=0.890625)

    def known(policy):
        return known_policy(PruningDecision((layer,), policy))

    assert known(POLICY).config == build_policy(POLICY).config
    # A file of version 0.1 may name another policy than that which decided.
    assert known(dict(POLICY, alpha=3)) is None
    assert known(dict(type='FixedCount', count=2)) is None
    assert known(dict(type='SomebodyElses')) is None


def lines_of(decision):
    """Labels of the lines in the picture of divergences, and where they are."""
    figure = Figure()
    kl_plot(decision)(figure, LIGHT)
    return {
        line.get_label(): line.get_xdata()[0]
        for line in figure.axes[0].lines
        if not line.get_label().startswith('_') and line.get_linestyle() != 'None'
    }


def test_parts_are_drawn():
    names = [f'backbone.layer1.{i}.layer_attn' for i in range(6)]
    decision = pruning((1, 1), 20, names, 0)
    figure = Figure()
    kl_plot(decision)(figure, LIGHT)
    dots = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(dots['shape part'].get_ydata()) == [1, 2, 3, 4, 5]
    assert list(dots['shape part'].get_xdata()) == [
        layer.shape for layer in decision.layers[1:]
    ]
    assert list(dots['uniform attention'].get_xdata()) == pytest.approx(
        np.log([2, 3 / 2, 4 / 3, 5 / 4, 6 / 5])
    )


def test_quantile_of_the_default_policy_is_drawn():
    names = [f'backbone.layer1.{i}.layer_attn' for i in range(6)]
    decision = pruning((1, 1), 20, names, 0, dict(type='EBQM'))
    kl = [x.divergence for x in decision.layers[1:]]
    lines = lines_of(decision)
    assert lines['0.5-quantile'] == pytest.approx(np.median(kl))
    low, high = min(kl), np.median(kl)
    expected = low + (high - low) * beta.ppf(0.2, 2, 5)
    assert lines['EBQM threshold'] == pytest.approx(expected, rel=1e-3)


def test_no_single_quantile_of_several_pools():
    names = [f'backbone.{s}.{i}.layer_attn' for s in 'ab' for i in range(6)]
    decision = pruning((1, 1), 20, names, 0, dict(type='EBQM', scope='stage'))
    assert lines_of(decision) == {}


def test_spread():
    assert _spread([0, 0, 1, 1], 0.1, 0, 1) == pytest.approx([0, 0.1, 0.9, 1])
    assert _spread([0.2, 0.8], 0.1, 0, 1) == [0.2, 0.8]


def test_timeline_shows_where_it_was_decided(tmp_path):
    """A window that was put off is shaded where it was measured, not as planned."""
    first, second = make_work_dir(tmp_path)
    put_off = replace(first, window=(2, 2), put_off=1)
    write_decisions(tmp_path, [put_off, second])
    path = tmp_path / 'pruning.json'
    content = json.loads(path.read_text())
    content['hook']['windows'] = [[1, 1], [3, 3], [4, 4]]
    path.write_text(json.dumps(content))
    figure = Figure()
    timeline_plot(Run(tmp_path))(figure, LIGHT)
    (axes,) = figure.axes
    shaded = [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches]
    assert shaded == [(1, 2), (2, 3), (3, 4)]  # the last one is still to come
    dashed = [x.get_xdata()[0] for x in axes.lines if x.get_linestyle() == '--']
    assert dashed == [2, 3]
    texts = [text.get_text() for text in axes.texts]
    assert {'after epoch 2', 'after epoch 3'} <= set(texts)


def test_text_is_escaped(tmp_path):
    evil, short = '<img src=http://example.org/x.png>\x1b[31m', '<b>$a$\x1b[31m'
    names = [f'backbone.{s}.{i}.layer_attn' for s in 'ab' for i in range(4)]
    decision = pruning((1, 1), 20, names, 0)
    layers = tuple(replace(x, reason=f'kept: {short} [/0.1') for x in decision.layers)
    decision = replace(decision, layers=layers, policy=dict(type=f'{evil}$a$'))
    log = write_log(tmp_path, '20260102_030405', [1])
    metric = json.dumps(f'coco/{evil} $x^{{$')
    log.write_text(log.read_text().replace('"coco/bbox_mAP_50"', metric))
    write_decisions(tmp_path, [decision])
    (tmp_path / '<b>bold & brave.py').write_text(CONFIG)
    page = Page(make_report(tmp_path))
    check_offline(page)
    assert 'b' not in page.tags and 'script' not in page.tags
    assert page.tags.count('img') == 5
    assert f'kept: {short} [/0.1' in page.text and '<b>bold & brave.py' in page.text
    assert evil in page.text
    text = summarize(tmp_path)
    assert '\x1b' not in text
    assert r'<b>$a$\x1b[31m [/0.1' in text and r'x.png>\x1b[31m $x^{$' in text


@pytest.mark.parametrize('name', ['a/../../../../outside', '<img>', 'a\x1b[31m', ''])
def test_names_are_names(tmp_path, name):
    """From no file may a name reach a path, the page or a terminal."""
    make_work_dir(tmp_path / 'run')
    report = tmp_path / 'run' / 'pruning.json'
    sound = report.read_text()
    report.write_text(sound.replace('backbone.layer1', json.dumps(name)[1:-1]))
    with pytest.raises(ValueError, match=f'{report} .*not a module name'):
        make_report(tmp_path / 'run')
    report.write_text(sound)
    path = write_measurement(tmp_path / 'run', 2, {name: stage(['active'] * 3)})
    with pytest.raises(ValueError, match=f'{path} .*not a module name'):
        make_report(tmp_path / 'run')


def test_window_cannot_leave_the_work_directory(tmp_path):
    make_work_dir(tmp_path / 'run')
    report = tmp_path / 'run' / 'pruning.json'
    content = json.loads(report.read_text())
    content['decisions'][0]['window'][1] = '/../../../outside/x'
    report.write_text(json.dumps(content))
    (tmp_path / 'outside').mkdir()
    with pytest.raises(ValueError, match='a bound of a window'):
        make_report(tmp_path / 'run')
    assert not list((tmp_path / 'outside').iterdir())


def test_not_a_number(tmp_path):
    """A diverged run has a report too."""
    log = write_log(tmp_path, '20260102_030405', [1, 2])
    log.write_text(
        log.read_text()
        .replace('"loss": 2.0', '"loss": NaN')
        .replace('"coco/bbox_mAP": 0.2', '"coco/bbox_mAP": NaN')
    )
    make_report(tmp_path)
    assert Run(tmp_path).best('coco/bbox_mAP') == (1, 0.1)


def test_killed_while_writing(tmp_path):
    log = write_log(tmp_path, '20260102_030405', [1])
    log.write_text(log.read_text() + '{"loss": 1.')
    make_report(tmp_path)
    log.write_text('{"loss": 1.\n' + log.read_text())
    with pytest.raises(ValueError, match=f'{log}, line 1,'):
        make_report(tmp_path)


def test_unreadable_checkpoint_and_foreign_decisions(tmp_path):
    make_work_dir(tmp_path)
    (tmp_path / 'epoch_4.pth').write_bytes(b'nothing')
    (tmp_path / 'my_config.py').write_text('no python (')
    text = Page(make_report(tmp_path)).text
    assert 'epoch_4.pth cannot be read' in text
    assert 'may come from an earlier run' in text
    (tmp_path / 'pruning.json').write_text('[]')
    with pytest.raises(ValueError, match=str(tmp_path / 'pruning.json')):
        make_report(tmp_path)


LOG = '20260102_030405/vis_data/scalars.json'
MAPS = 'layer_attention/epoch_2/layer_attention.json'


@pytest.mark.parametrize(
    'file, old, new',
    [
        (LOG, '"loss": 4.0', '"loss": "low"'),
        (LOG, '"loss": 4.0', '"loss": [4.0]'),
        (LOG, '"time": 0.5', '"time": null'),
        (LOG, '"time": 0.5', f'"time": {10**400}'),
        (LOG, '"epoch": 1', '"epoch": {}'),
        (LOG, '"epoch": 1', '"epoch": 1.5'),
        (LOG, '"loss"', '\udcff"loss"'),
        (LOG, '{"loss"', '[' * 100_000 + '{"loss"'),
        ('pruning.json', '"iteration": 20', '"iteration": -1e400'),
        ('pruning.json', '"hook"', '"hooks"'),
        (MAPS, '"states"', '"state"'),
        (MAPS, '"mean": 0.9', '"mean": "much"'),
        (MAPS, '"mean": [[', '"mean": [[3], ['),
        (MAPS, '"histogram": [', '"histogram": ["a", '),
        (MAPS, '"blocks"', '"block"'),
        (MAPS, '"divergence": null', '"divergence": "null"'),
        (MAPS, '"layers"', '"layer"'),
        (MAPS, '"checkpoint"', '"check"'),
    ],
)
def test_malformed_files_are_one_line(tmp_path, file, old, new):
    """The file is named; no traceback, whatever stands in it."""
    make_work_dir(tmp_path)
    write_measurement(
        tmp_path, 2, {'backbone.layer1': stage(['active', 'pruned', 'active'])}
    )
    path = tmp_path / file
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode('utf-8', 'surrogateescape'))
    main = runpy.run_path(str(TOOL))['main']
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path)])
    message = error.value.code
    assert message.startswith('error: ') and str(path) in message
    assert '\n' not in message and len(message) < 600


@pytest.mark.parametrize(
    'states',
    [
        torch.tensor([0, 1, 2], dtype=torch.uint8),  # of mmela 0.1
        torch.tensor([encode(state) for state in AttentionState]),
        torch.tensor([0.0, -0.6, 0.7]),  # averages of networks, some of them pruned
    ],
)
def test_value_only_keeps_its_parameters(tmp_path, states):
    write_log(tmp_path, '20260102_030405', [1])
    state = {}
    for i in range(3):
        name = f'backbone.layer1.{i}.layer_attn'
        state[f'{name}.weight'] = torch.zeros(10)
        state[f'{name}.state'] = states[i]
        state[f'{name}.signature'] = encode_text('MLA()')
    torch.save(dict(state_dict=state), tmp_path / 'epoch_1.pth')
    (tmp_path / 'last_checkpoint').write_text('epoch_1.pth')
    counts = Run(tmp_path).parameters()
    assert (counts.total, counts.pruned) == (30, 10)
    assert (counts.active, counts.value_only) == (1, 1)
    assert '1 only keep their key' in Page(make_report(tmp_path)).text


def test_tool(synthetic, tmp_path, capsys):
    main = runpy.run_path(str(TOOL))['main']
    out = tmp_path / 'page.html'
    main([str(synthetic[0]), '--out', str(out)])
    check_offline(Page(out))
    assert str(out) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(['--help'])
    assert 'Example:' in capsys.readouterr().out


def test_tool_errors_are_one_line(tmp_path):
    main = runpy.run_path(str(TOOL))['main']
    (tmp_path / 'file').touch()
    (tmp_path / 'empty').mkdir()
    make_work_dir(tmp_path)
    for args, path in [
        ([tmp_path / 'missing'], 'missing'),
        ([tmp_path / 'file'], 'file'),
        ([tmp_path / 'empty'], 'empty'),
        ([tmp_path, '--out', tmp_path / 'no' / 'x'], 'no/x'),
    ]:
        with pytest.raises(SystemExit) as error:
            main(list(map(str, args)))
        assert str(tmp_path / path) in error.value.code
        assert '\n' not in error.value.code


def test_real_run(tmp_path):
    """The runner and the hook write what the report reads."""
    hook = dict(windows=[(1, 1), (3, 3)], policy=dict(type='EBQM', mu=0.9))
    cfg = toy_config(tmp_path, hook)
    train(
        cfg,
        val_dataloader=dict(
            cfg.train_dataloader, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        val_cfg=dict(),
        val_evaluator=dict(type='ToyMetric', prefix='toy'),
    )
    page = Page(make_report(tmp_path))
    check_offline(page)
    last = decisions(tmp_path)[-1]
    assert last.pruned or len(last.layers) < 8
    for layer in last.layers:
        assert layer.reason in page.text
    assert f'{len(last.active)} of 8' in ' '.join(page.text.split())
    text = summarize(tmp_path)
    assert str(tmp_path / 'epoch_4.pth') in text
    assert 'After epoch 1: 8 -> ' in text
    assert 'Epoch 4: toy/mean ' in text
    run = Run(tmp_path)
    assert list(run.losses) == list(range(1, 13))
    assert run.done == run.planned == 4 and not run.notes
    assert run.parameters().active == len(last.active)


# -- in a browser ----------------------------------------------------------


def browse(chromium, page, profile, *args):
    profile.mkdir()
    process = subprocess.run(
        [
            chromium,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-quic',
            '--no-first-run',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
            f'--user-data-dir={profile}',
            '--enable-logging=stderr',
            '--v=0',
            '--virtual-time-budget=3000',
            *args,
            page.as_uri(),
        ],
        env=dict(os.environ, HOME=str(profile)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope='module')
def chromium():
    path = shutil.which('chromium') or shutil.which('chromium-browser')
    if path is None:
        pytest.skip('Chromium is not installed')
    return path


@pytest.fixture(scope='module')
def with_maps(tmp_path_factory):
    """Report on a run measured before and after a pruning, as the demo."""
    work_dir = tmp_path_factory.mktemp('with_maps')
    make_work_dir(work_dir)
    before = ['active'] * 6
    after = ['active', 'active', 'pruned', 'active', 'active', 'pruned']
    for epoch, states in ((2, before), (4, after)):
        stages = {'backbone.layer3': states, 'backbone.layer4': states[:3]}
        write_measurement(work_dir, epoch, {k: stage(v) for k, v in stages.items()})
    return make_report(work_dir)


def test_maps_side_by_side(with_maps):
    page = Page(with_maps)
    check_offline(page)
    text = ' '.join(page.text.split())
    _, _, maps = text.partition('Attention maps, before and after')
    places = [
        maps.index(x)
        for x in (
            'Attention weights of layer3',
            'epoch_2: 6 of 6 active',
            'epoch_4: 4 of 6 active',
            'Attention weights of layer4',
            'epoch_2: 3 of 3 active',
            'epoch_4: 2 of 3 active',
            'Layer attention of epoch_2',
            'Layer attention of epoch_4',
        )
    ]
    assert places == sorted(places)
    # The same caption is said once.
    assert text.count('Mean over images and heads') == 1
    # Of the run, and of each measurement two maps, KL, policy, features and
    # queries
    assert page.tags.count('img') == 7 + 2 * 6


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1200])
def test_in_browser(with_maps, tmp_path, chromium, width, scheme):
    shot = tmp_path / 'shot.png'
    # Blink's numbers of the colour schemes
    preferred = dict(dark=0, light=1)[scheme]
    size = [
        f'--window-size={width},2000',
        '--hide-scrollbars',
        f'--blink-settings=preferredColorScheme={preferred}',
    ]
    process = browse(
        chromium, with_maps, tmp_path / 'profile', *size, f'--screenshot={shot}'
    )
    assert 'CONSOLE' not in process.stderr, process.stderr
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert('L'))
    assert pixels.shape == (2000, width)
    assert (pixels[2, 2] < 64) == (scheme == 'dark')
    assert pixels.std() > 10

    # Chromium's windows are no narrower than 500, frames are. The page itself
    # allows no script, so the one around it measures.
    html = escape(with_maps.read_text(encoding='utf-8'))
    frame = tmp_path / 'frame.html'
    frame.write_text(
        f"""<meta charset="utf-8"><meta name="color-scheme"
        content="light dark"><title></title><iframe srcdoc="{html}" style=
        "width: {width}px; height: 2000px; border: 0"></iframe>
        <script>onload = () => {{
          const page = document.querySelector('iframe').contentDocument;
          page.querySelectorAll('details').forEach(x => x.open = true);
          const images = [...page.images];
          document.title = JSON.stringify([
            page.defaultView.innerWidth, page.scrollingElement.scrollWidth,
            images.length, images.filter(x => x.naturalWidth).length,
            images.filter(x => x.currentSrc == x.src).length]);
        }}</script>""",
        encoding='utf-8',
    )
    process = browse(chromium, frame, tmp_path / 'profile2', *size, '--dump-dom')
    title = re.search('<title>(.*)</title>', process.stdout)[1]
    inner, scroll, images, loaded, light = json.loads(title)
    assert inner == width and scroll <= width
    assert images == loaded == 7 + 2 * 6
    assert light == (images if scheme == 'light' else 0)


def test_config_of_the_run(tmp_path):
    """Its own dump, whatever was written into the directory since."""
    make_work_dir(tmp_path)
    for stamp in ('20260102_030405', '20260103_030405'):
        if not (tmp_path / stamp).exists():
            write_log(tmp_path, stamp, [4])
        dump = tmp_path / stamp / 'vis_data' / 'config.py'
        dump.write_text(f'{CONFIG}stamp = {stamp!r}\n')
    (tmp_path / 'my_config.py').write_text(dump.read_text())
    (tmp_path / 'slim.py').write_text('slim = True\n')
    for name, older in (('my_config.py', 9e8), ('slim.py', 1e9)):
        os.utime(tmp_path / name, (older, older))
    run = Run(tmp_path)
    assert run.config_path == dump and "'20260103_030405'" in run.config
    assert run.config_name == 'my_config.py'
    page = Page(make_report(tmp_path)).text
    assert 'Config my_config.py' in ' '.join(page.split()) and 'slim = True' not in page
    (tmp_path / 'my_config.py').unlink()
    assert Run(tmp_path).config_name == 'config.py'
    for dump in tmp_path.glob('*/vis_data/config.py'):
        dump.unlink()
    assert Run(tmp_path).config_name == 'slim.py'


@pytest.mark.parametrize(
    'old, new',
    [('"format": 1', '"format": 3'), ('"kind": "classes"', '"kind": "a"'),
     ('"active": 1', '"active": "one"'), ('"images": 2', '"images": []'),
     ('"shown": []', '"shown": [1]'), ('{"format"', '["format"')],
)  # fmt: skip
def test_damaged_comparison_is_one_line(tmp_path, old, new):
    make_work_dir(tmp_path)
    side = dict(checkpoint='a', epoch=1, iteration=None, active=1, attentions=2)
    side.update(mean=None, per_class=[])
    content = dict(format=1, stamp=[], kind='classes', note='', images=2, total=2)
    content.update(classes=['a'], sides=dict(after=side), shown=[])
    path = tmp_path / 'before_after' / 'before_after.json'
    path.parent.mkdir()
    text = json.dumps(content)
    path.write_text(text)
    assert read_before_after(tmp_path)['sides']['after']['active'] == 1
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match='was not written by') as error:
        make_report(tmp_path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)
