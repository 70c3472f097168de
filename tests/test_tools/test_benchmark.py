"""tools/benchmark: structure, formulas and masks; nothing about times."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from mmela.layers import AttentionState, MRLABase, MRLALight, SequentialAttentionStage
from mmela.pruning import LayerDecision, PruningDecision
from mmela.structure import layer_attentions
from tests.helpers.work_dirs import write_decisions
from tools.benchmark import (
    common,
    compare,
    depth,
    gpu,
    hook_overhead,
    inference,
    memory,
    networks,
    plot,
    predict,
    profile_branch,
    published_form,
    traffic,
    train_step,
)

pytest.importorskip('mmpretrain')

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device('cpu')
TINY = (
    '--device',
    'cpu',
    '--net',
    'cifar20',
    '--size',
    '16',
    '--batch',
    '2',
    '--rounds',
    '2',
    '--warmup',
    '1',
    '--bandwidth-mib',
    '1',
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Results and printed table of train_step.py, run as a user runs it."""
    out = tmp_path_factory.mktemp('benchmark') / 'results.json'
    done = subprocess.run(
        [
            sys.executable,
            '-W',
            'ignore',
            '-m',
            'tools.benchmark.train_step',
            *TINY,
            '--out',
            str(out),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONDONTWRITEBYTECODE='1'),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout, out


def options(*args):
    """Options of train_step.py for the tiny network, complete."""
    args = train_step.parse_args([*TINY, *map(str, args)])
    networks.complete_options(args, common.set_up(args))
    return args


def stage_of(cls, depth, channels=8, **kwargs):
    torch.manual_seed(0)
    stage = SequentialAttentionStage(*(nn.Identity() for _ in range(depth)))
    for i in range(depth):
        stage.attach(i, cls(channels, head_dim=4, **kwargs))
    return stage


# -- the published form ----------------------------------------------------


@pytest.mark.parametrize('form', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('state', list(AttentionState))
def test_published_form_is_mrla_base(form, state):
    ours = stage_of(MRLABase, 4)
    published = stage_of(published_form.PublishedMRLABase, 4)
    published.load_state_dict(ours.state_dict())
    results = []
    for stage in (ours, published):
        stage.attentions[1].attention_state = state
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 8, 6, 5, generator=generator)
        x = x.contiguous(memory_format=form).requires_grad_()
        out = stage(x)
        out.square().sum().backward()
        grads = [p.grad for p in stage.parameters() if p.grad is not None]
        results.append([out, x.grad, *grads])
    assert len(results[0]) == len(results[1]) > 2
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- traffic ---------------------------------------------------------------


VALUE = 2 * 8 * 3 * 5 * 4  # bytes of one value


def traffic_of(stage, train=True):
    model = nn.ModuleDict(dict(stage=stage))
    x = torch.randn(2, 8, 3, 5)
    with torch.set_grad_enabled(train):
        return traffic.sum_traffic(model, lambda: stage(x), 4)


@pytest.mark.parametrize('cls', [MRLABase, published_form.PublishedMRLABase])
def test_traffic_of_three_blocks(cls):
    # Blocks see 1, 2 and 3 values. Forward: read those, and write 1 each.
    # Backward: read them and the gradient of the output, write as many gradients.
    stage = stage_of(cls, 3)
    assert traffic_of(stage, train=False) == (2 + 3 + 4) * VALUE
    assert traffic_of(stage) == ((2 + 3 + 4) + (3 + 5 + 7)) * VALUE
    assert stage.observer is None and not stage._forward_hooks


def test_traffic_counts_what_is_seen():
    stage = stage_of(MRLABase, 4)
    stage.attentions[1].attention_state = AttentionState.VALUE_ONLY
    stage.attentions[2].attention_state = AttentionState.PRUNED
    # Blocks 1 and 4 attend, over V1 and over V1, V2, V4
    assert traffic_of(stage) == ((2 + 4) + (3 + 7)) * VALUE


def test_traffic_of_what_weighs_no_layers():
    assert traffic_of(stage_of(MRLALight, 2, previous='output')) == 0


def test_bandwidth():
    assert traffic.copy_bandwidth(CPU, 1 << 20, repeats=2) > 0


# -- memory ----------------------------------------------------------------


def test_peak_is_that_of_what_lives_at_once():
    kib = 1 << 10

    def step():
        first = torch.empty(1024 * kib, dtype=torch.uint8)
        second = torch.empty(512 * kib, dtype=torch.uint8)  # peak: 1536 KiB
        del first
        third = torch.empty(768 * kib, dtype=torch.uint8)
        return second, third

    for _ in range(2):  # what an earlier measurement has left does not count
        assert memory.peak_rise(step, CPU) == 1536 * kib


def test_shared_storage_counts_once():
    x = torch.zeros(10)
    assert memory.storage_bytes([x, x[3:], torch.ones(2)]) == 48


# -- masks -----------------------------------------------------------------


def test_half_mask():
    names = [
        f'backbone.layer{s}.{b}.layer_attn'
        for s, depth in ((1, 3), (2, 4))
        for b in range(depth)
    ]
    assert networks.half_mask(names) == [
        f'backbone.layer{block}.layer_attn' for block in ('1.1', '2.1', '2.3')
    ]


def pruned_in(*args):
    args = options(*args)
    model = networks.build_network('ela', args)
    networks.prune_network('ela', model, args)
    return [
        name.split('.', 1)[1].rsplit('.', 1)[0]
        for name, a in layer_attentions(model).items()
        if a.attention_state == AttentionState.PRUNED
    ]


def test_masks(tmp_path):
    assert pruned_in() == ['layer1.1', 'layer2.1', 'layer3.1']
    assert pruned_in('--prune', 'layer2.1') == ['layer2.1']
    full = 'backbone.layer3.1.layer_attn'
    path = tmp_path / 'mask.json'
    layer = LayerDecision('layer1.1', 'layer1', pruned=True)
    write_decisions(
        tmp_path,
        [
            PruningDecision((x,), {}, window=(1, 1), unit='epoch', iteration=1)
            for x in (layer, replace(layer, name=full))
        ],
    )
    report = tmp_path / 'pruning.json'
    assert pruned_in('--mask', report) == ['layer1.1', 'layer3.1']
    for content, expected in (
        (dict(pruned=[full]), ['layer3.1']),
        ([], []),
    ):
        path.write_text(json.dumps(content))
        assert pruned_in('--mask', path) == expected


def test_wrong_options_are_one_line(tmp_path):
    path = tmp_path / 'mask.json'
    path.write_text('{"layers": []}')
    for args, text in (
        (('--variants', 'mrla'), "'mrla' is unknown"),
        (('--variants', 'kcla:triton'), "'kcla:triton'"),
        (('--variants', 'ela', 'ela'), 'twice'),
        (('--batch', '0'), '--batch=0'),
        (('--mask', path), 'pruned'),
        (('--device', 'cpuu'), '--device=cpuu'),
    ):
        with pytest.raises(SystemExit) as error:
            options(*args)
        assert str(error.value).startswith('error: ')
        assert text in str(error.value) and '\n' not in str(error.value)
    with pytest.raises(SystemExit, match="'layer9.0' has no layer attention"):
        pruned_in('--prune', 'layer9.0')


# -- statistics ------------------------------------------------------------


def test_rounds_take_turns():
    calls = []
    actions = {n: lambda n=n: calls.append(n) for n in 'abc'}
    times = common.run_rounds(actions, 3, CPU, steps=2)
    assert ''.join(calls) == 'aabbccbbccaaccaabb'
    assert {n: len(t) for n, t in times.items()} == dict(a=3, b=3, c=3)


class Stderr(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize('terminal', [True, False])
def test_progress(monkeypatch, terminal):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(common.time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(sys, 'stderr', Stderr(terminal))
    assert list(common.progress('abcde')) == list('abcde')
    printed = sys.stderr.getvalue()
    if terminal:  # each on top of the one before
        assert printed.count('\r') == 5 and printed.count('\n') == 1
    else:  # after 40 s and 80 s
        assert printed.splitlines() == [
            '2 of 5, about 60 s left',
            '4 of 5, about 20 s left',
        ]


def test_no_round_begins_after_the_limit(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(common.time, 'perf_counter', lambda: next(clock))
    seen = []
    times = common.run_rounds(
        {'a': int, 'b': int}, 9, CPU, 1, 8, lambda t: seen.append(len(t['b']))
    )
    # A call takes 1 s, and each look at the clock: 5 s for a round
    assert {n: len(t) for n, t in times.items()} == dict(a=2, b=2)
    assert seen == [1, 2]


def test_statistics():
    result = common.summary([1.0, 2.0, 3.0, 4.0, 10.0])
    assert result['median'] == 3 and result['iqr'] == 2
    assert common.summary([2.0])['iqr'] == 0
    # A machine that slows down: each round has the same ratio
    assert common.ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == 2
    assert common.noisy(dict(a=result, b=dict(error=''))) == ['a']


def test_busy_machine_is_told(monkeypatch, capsys):
    monkeypatch.setattr(os, 'getloadavg', lambda: (1e4, 0, 0))
    about = common.machine(CPU)
    common.warn_if_busy(about)
    assert about['busy'] and 'BUSY' in common.describe(about)
    assert 'load average 10000.0' in capsys.readouterr().err
    monkeypatch.setattr(os, 'getloadavg', lambda: (0.0, 0, 0))
    assert not common.machine(CPU)['busy']


@pytest.mark.parametrize('a, b', [(3.0, 0.0), (2.0, 0.5)])
def test_fit_recovers_growth(a, b):
    blocks = [2, 6, 12]
    fit = depth.fit_growth(blocks, [a * t + b * t**2 for t in blocks])
    assert fit['linear'] == pytest.approx(a)
    assert fit['quadratic'] == pytest.approx(b, abs=1e-9)
    assert fit['share'] == pytest.approx(12 * b / (a + 12 * b), abs=1e-9)
    assert fit['growth'] == ('quadratic' if b else 'linear')


# -- the tools -------------------------------------------------------------


def test_train_step(trained):
    results, printed, _ = trained
    variants = results['variants']
    assert list(variants) == list(networks.VARIANTS)
    for result in variants.values():
        assert len(result['times']) == 2
        assert result['peak_bytes'] > result['resident_bytes'] > 0
    # One function in two forms, one of which copies
    ours, published = variants['mrla-base'], variants['published']
    assert ours['loss'] == pytest.approx(published['loss'], rel=1e-5)
    assert ours['parameters'] == published['parameters']
    assert ours['peak_bytes'] < published['peak_bytes']
    assert published['ratio']['published'] == 1
    assert ours['memory_ratio']['published'] == pytest.approx(
        ours['peak_bytes'] / published['peak_bytes']
    )
    # 2 images; three stages of two blocks: 64 channels at 16 x 16, 128 at
    # 8 x 8, 256 at 4 x 4. Two blocks: 5 forward, 8 backward; every second
    # pruned: 2 + 3.
    elements = 2 * (64 * 16**2 + 128 * 8**2 + 256 * 4**2)
    assert ours['traffic'] == 13 * elements * 4
    assert variants['ela']['traffic'] == 5 * elements * 4
    assert variants['resnet']['traffic'] == 0
    assert (variants['ela']['active'], variants['ela']['attentions']) == (3, 6)
    assert {'name', 'cores', 'torch', 'load_average'} <= set(results['machine'])
    assert results['settings']['size'] == [16, 16]
    rows = [line for line in printed.splitlines() if line.startswith('|')]
    assert [row.split('|')[1].strip() for row in rows[2:]] == list(variants)
    assert len({row.count('|') for row in rows}) == 1


def test_inference(tmp_path, capsys):
    out = tmp_path / 'results.json'
    inference.main(
        [
            *TINY,
            '--variants',
            'resnet',
            'mrla-base:reference',
            '--channels-last',
            '--out',
            str(out),
        ]
    )
    results = json.loads(out.read_text())['variants']
    elements = 2 * (64 * 16**2 + 128 * 8**2 + 256 * 4**2)
    assert results['mrla-base:reference']['traffic'] == 5 * elements * 4
    assert list(results['mrla-base:reference']['ratio']) == ['resnet']
    assert 'images/s' in capsys.readouterr().out


def test_half_precision():
    args = options('--dtype', 'bf16', '--variants', 'mrla-base')
    results = compare.compare(args, CPU, train=True)
    elements = 2 * (64 * 16**2 + 128 * 8**2 + 256 * 4**2)
    assert results['variants']['mrla-base']['traffic'] == 13 * elements * 2


def test_without_memory_for_a_variant(monkeypatch):
    prepare = networks.Contestant.prepare

    def fail(self, warmup):
        if type(self.model.backbone).__name__ == 'ELABottleneckResNet_CIFAR':
            raise torch.cuda.OutOfMemoryError
        return prepare(self, warmup)

    monkeypatch.setattr(networks.Contestant, 'prepare', fail)
    args = options('--variants', 'published', 'resnet')
    results = compare.compare(args, CPU, train=True)
    assert results['variants']['published'] == dict(error='out of memory')
    assert results['variants']['resnet']['ratio'] == dict(resnet=1)
    assert 'out of memory' in compare.table(results)


def test_depth(tmp_path, capsys):
    out = tmp_path / 'results.json'
    depth.main(
        [
            '--device',
            'cpu',
            '--channels',
            '16',
            '--head-dim',
            '8',
            '--size',
            '32',
            '--batch',
            '4',
            '--blocks',
            '2',
            '6',
            '12',
            '--rounds',
            '1',
            '--warmup',
            '1',
            '--bandwidth-mib',
            '1',
            '--out',
            str(out),
        ]
    )
    results = json.loads(out.read_text())
    # Concatenation keeps O(T^2) values, so does MLA, which makes them anew
    growth = {n: f['memory']['growth'] for n, f in results['fits'].items()}
    assert growth == {
        'published': 'quadratic',
        'mla': 'quadratic',
        'mrla-base': 'linear',
        'mrla-light': 'linear',
        'kcla': 'linear',
    }
    assert [r['blocks'] for r in results['stages']['kcla']] == [2, 6, 12]
    assert 'kcla, 12 blocks' in capsys.readouterr().out


def test_hook_overhead(monkeypatch, capsys):
    measured = []
    meter = hook_overhead.LayerAttentionPruningHook._open_window
    monkeypatch.setattr(
        hook_overhead.LayerAttentionPruningHook,
        '_open_window',
        lambda self, window: (measured.append(window), meter(self, window)),
    )
    args = hook_overhead.parse_args(
        [*TINY, '--imports', '1', '--toolbox', 'mmpretrain']
    )
    monkeypatch.setattr(
        hook_overhead,
        'import_times',
        lambda imports, repeats: dict(zip(imports, ([2.0], [3.0]))),
    )
    results = hook_overhead.measure(args, common.set_up(args))
    assert measured == [(1, 1)]  # one hook has measured, the other has not
    assert list(results['steps']) == ['no hook', 'outside', 'inside']
    both = results['imports']['import mmpretrain; import mmela']
    assert both['ratio'] == 1.5
    printed = hook_overhead.table(results)
    assert '+50.00%' in printed
    share = results['measuring']['median'] / results['steps']['no hook']['median']
    assert 0 < share and f'{share:.2%} of it' in printed


def test_import_times():
    imports = ['import sys', 'from time import sleep; sleep(0.2)']
    times = hook_overhead.import_times(imports, 2)
    assert [len(times[statement]) for statement in imports] == [2, 2]
    assert min(times[imports[1]]) >= 0.2
    with pytest.raises(SystemExit, match='error: import no_toolbox'):
        hook_overhead.import_times(['import no_toolbox'], 1)


def test_detector():
    pytest.importorskip('mmdet')
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    args = train_step.parse_args(
        ['--net', 'mask-rcnn', '--device', 'cpu', '--size', '64x96', '--batch', '1']
    )
    networks.complete_options(args, common.set_up(args))
    contestant = networks.Contestant('ela', args, CPU, weights={})
    assert contestant.batch['inputs'].shape == (1, 3, 64, 96)
    assert contestant.loss().item() > 0
    half = [a.active for a in layer_attentions(contestant.model).values()]
    assert half == [
        *(True, False, True),
        *(True, False, True, False),
        *(True, False, True, False, True, False),
        *(True, False, True),
    ]


def test_plot(trained, tmp_path):
    path = trained[2]
    out = tmp_path / 'picture.svg'
    plot.main([str(path), str(path), '--out', str(out)])
    assert '<svg' in out.read_text()
    names, times, memory = plot.bars(trained[0], 'published')
    assert names == list(networks.VARIANTS)
    assert times[names.index('published')] == 1
    assert memory[names.index('published')] == 1
    figure = plot.draw([trained[0]], 'resnet')
    assert 'cifar20' in figure.axes[0].get_title()
    assert trained[0]['machine']['name'] in figure.axes[0].get_title()
    with pytest.raises(SystemExit, match="no results of 'resnet'"):
        content = dict(trained[0], variants={})
        path = tmp_path / 'empty.json'
        path.write_text(json.dumps(content))
        plot.load(str(path), 'resnet')


# -- predictions -----------------------------------------------------------


def recorded(call):
    with predict.Recorder() as recorder:
        call()
    return recorder.operators


def test_operators_are_counted():
    x, conv = torch.randn(2, 4, 6, 6), nn.Conv2d(4, 8, 3, bias=False)
    conv.weight.requires_grad_()
    out, size = 2 * 8 * 4 * 4, 4  # elements of the output, bytes of each
    forward, relu, total, *rest = recorded(
        lambda: conv(x).relu().sum().backward()  # a view in between is no kernel
    )
    assert (forward.name, relu.name, total.name) == ('convolution', 'relu', 'sum')
    assert forward.flops == 2 * out * 4 * 9
    assert forward.bytes == (2 * 4 * 36 + 8 * 4 * 9 + out) * size
    assert (relu.flops, relu.bytes) == (0, 2 * out * size)
    backward = rest[-1]  # no copy of the gradient
    # Of the weight alone
    assert backward.name == 'convolution_backward'
    assert backward.flops == forward.flops


def test_grouped_convolutions_backward():
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    *_, backward = recorded(lambda: conv(x).sum().backward())
    assert backward.flops == 2 * (2 * 2 * 8 * 25 * 9)


def test_rows_of_operators_are_fused():
    x, w = torch.randn(10), torch.randn(10, 10)
    operators = recorded(lambda: ((x * 2 + 1).relu()[None] @ w).exp().neg().sum())
    assert [o.name for o in operators][:3] == ['mul', 'add', 'relu']
    kernels = list(predict.fused(operators))
    # Read x and write the row's result; mm; read that and write the sum
    assert [size for _, size in kernels] == [80, (10 + 100 + 10) * 4, 44]


def test_time_of_kernels():
    device = predict.Device(bandwidth=1e9, rate=1e12)
    assert device.seconds(1e9, 1e5) == 1e-3  # bound by arithmetic
    assert device.seconds(1e6, 1e6) == 1e-3  # bound by memory
    assert device.seconds(1, 1) == predict.LATENCY
    tiny = [predict.Operator('relu', 0, ((0, 4),), ((1, 4),))] * 10
    assert device.eager(tiny) == pytest.approx(10 * predict.HOST)


def test_exchange_of_gradients_is_hidden_but_for_the_last_bucket():
    size = 4 * predict.BUCKET
    whole = 2 * 7 / 8 * size / predict.LINK
    assert predict.all_reduce(1.0, size, 1) == 1.0
    assert predict.all_reduce(1.0, size, 8) == pytest.approx(1 + whole / 4)
    assert predict.all_reduce(0.0, size, 8) == pytest.approx(whole)


def test_predict(trained, tmp_path, capsys):
    out = tmp_path / 'predicted.json'
    predict.main(
        ['--nets', 'cifar20', '--size', '16', '--batch', '2', '--dtype', 'fp32']
        + ['--variants', 'resnet', 'published', 'mrla-base', 'mrla-base:autograd']
        + ['--gpus', '1', '8', '--measured', str(trained[2]), '--out', str(out)]
    )
    rows = {r['variant']: r for r in json.loads(out.read_text())['rows']}
    assert rows['resnet']['operators'] < rows['mrla-base']['operators']
    # 'auto' is what it would be on a GPU, not what it is on this CPU
    assert rows['mrla-base']['operators'] == rows['mrla-base:autograd']['operators']
    # The compiler fuses; concatenation moves more
    assert rows['mrla-base']['kernels'] < rows['mrla-base']['operators']
    assert rows['mrla-base']['gigabytes'][0] < rows['published']['gigabytes'][0]
    measured = trained[0]['variants']['mrla-base']['ratio']['resnet']
    row = next(x for x in capsys.readouterr().out.splitlines() if 'mrla-base' in x)
    assert f' {measured:.2f} ' in row


# -- all of it on a GPU, here without ------------------------------------------


@pytest.fixture(scope='module')
def reduced(tmp_path_factory):
    """Folder that gpu.sh has filled, without a GPU."""
    out = tmp_path_factory.mktemp('gpu') / 'out'
    done = subprocess.run(
        ['bash', 'tools/benchmark/gpu.sh', str(out), '--reduced', '--parts']
        + ['checks', 'tune', 'r50', 'rewrap'],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, MMELA_PYTHON=sys.executable),
    )
    log = (out / 'log.txt').read_text() if out.is_dir() else ''
    assert done.returncode == 0, done.stderr[-2000:] + log[-2000:]
    return out


def test_gpu_script(reduced):
    results = json.loads((reduced / 'results.json').read_text())
    parts = results['parts']
    assert {p['status'] for p in parts.values()} == {'done'}
    checks = parts['checks']['results']
    assert checks['complete'] and checks['passed'] >= 6 and checks['failed'] == []
    variants = parts['r50']['results']['variants']
    assert list(variants) == ['resnet', 'published', 'mrla-base']
    assert parts['rewrap']['results']['median'] > 0
    tables = (reduced / 'tables.md').read_text()
    assert 'Tiny networks' in tables and '| mrla-base' in tables
    kernels = 'triton' in sys.modules or find_spec('triton') is not None
    assert ('## Triton kernels' in tables) == kernels
    assert 'default' in json.loads((reduced / 'triton_blocks.json').read_text())


def endless(out):
    common.write_results(out, dict(tool='endless', rounds=1), tell=False)
    time.sleep(1000)


def test_a_part_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    """What it has written stays, and the next part has its turn."""
    monkeypatch.setattr(gpu, 'PRELOAD', ())
    monkeypatch.setattr(gpu, 'work', lambda tool, arguments, out, log: endless(out))
    monkeypatch.setattr(gpu, 'POLL', 0.1)
    run = gpu.Run(tmp_path, time.monotonic() + 60, reduced=True)
    run.method = 'fork'
    run.run([gpu.Part('a', 'endless', budget=1), gpu.Part('b', 'endless', budget=2)])
    run.end = time.monotonic()
    run.run([gpu.Part('c', 'endless')])
    run.stop()
    assert [run.status(name) for name in 'abc'] == ['stopped'] * 3
    found = json.loads((tmp_path / 'results.json').read_text())['parts']
    assert found['a']['results'] == dict(tool='endless', rounds=1)
    assert not run.folder.exists()


def test_only_what_is_compiled_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'work', lambda *args: None)
    run = gpu.Run(tmp_path, time.monotonic() + 60, reduced=False)
    run.method = 'fork'
    run.parts['warm r50 ela'] = dict(status='done', seconds=1.0)
    run.parts['warm r50 resnet'] = dict(status='stopped', seconds=1.0)
    timed = gpu.timed('x', 'r50', '--compile', variants=('resnet', 'ela'), warm='r50')
    run.run([timed, gpu.timed('y', 'r101', variants=('ela',), warm='r101')])
    run.stop()
    assert run.parts['x']['arguments'][-2:] == ['--variants', 'ela']
    assert run.status('y') == 'nothing compiled'


def test_every_part_has_options_that_its_tool_takes():
    """Or the mistake would show on a GPU."""
    names = [part.name for part in gpu.PARTS]
    assert len(set(names)) == len(names)
    for part in gpu.PARTS:
        if part.tool in ('train_step', 'inference', 'hook_overhead'):
            tool = dict(
                train_step=train_step, inference=inference, hook_overhead=hook_overhead
            )[part.tool]
            variants = ['--variants', *part.variants] if part.variants else []
            args = tool.parse_args([*part.arguments, *variants])
            networks.complete_options(args, torch.device('cuda'))
        for variant in part.variants if part.warm else ():
            assert f'warm {part.warm} {variant}' in names
    assert {goal[0] for goal in gpu.GOALS} <= set(names)


@pytest.mark.parametrize('inference', [False, True])
def test_profile_branch(inference, tmp_path, capsys):
    out = tmp_path / 'profile.json'
    extra = ['--inference'] if inference else []
    profile_branch.main([*TINY, '--variant', 'ela', '--out', str(out), *extra])
    results = json.loads(out.read_text())
    parts = results['parts']
    assert list(parts)[:7] == list(profile_branch.PARTS)
    # Two blocks a stage, of which the second is pruned: one token each
    sizes = [2 * c * s * s * 4 for c, s in ((64, 16), (128, 8), (256, 4))]
    assert parts['value']['forward']['traffic'] == 2 * sum(sizes)
    assert parts['sum']['backward']['traffic'] == 3 * sum(sizes)
    whole = sum(parts[name]['forward']['traffic'] for name in profile_branch.PARTS)
    assert parts['as computed']['forward']['traffic'] == whole
    header = next(x for x in capsys.readouterr().out.splitlines() if x[:1] == '|')
    assert ('backward, ms' in header) is not inference


def test_profiled_parts_are_the_branch():
    args = profile_branch.parse_args([*TINY, '--variant', 'mrla-base'])
    args.variants = [args.variant]
    networks.complete_options(args, CPU)
    contestant = networks.Contestant(args.variant, args, CPU, {})
    blocks = profile_branch.find_blocks(contestant)
    assert [b.tokens for b in blocks] == [1, 2] * 3
    inputs = [[b.map()] for b in blocks]
    for block in blocks:
        block.attention.train()
    torch.testing.assert_close(
        profile_branch.run_branch(blocks)(inputs),
        profile_branch.run_plain(blocks)(inputs),
    )
