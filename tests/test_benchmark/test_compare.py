"""mmela compare and mmela hook-overhead: what is measured, not how long it takes."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmela.benchmark import compare, hook_overhead, memory, networks, rounds
from mmela.benchmark.published_form import PublishedMRLABase
from mmela.layers import AttentionState, MRLABase
from mmela.ops import compile as compiler
from mmela.pruning import LayerDecision, PruningDecision
from mmela.structure import layer_attentions
from tests.helpers.stages import BlockStage
from tests.helpers.work_dirs import write_decisions

pytest.importorskip('mmpretrain')

CPU = torch.device('cpu')
TINY = ['--device', 'cpu', '--net', 'cifar20', '--size', '16', '--batch', '2']
TINY += ['--rounds', '2']


# -- the published form ----------------------------------------------------


def stage_of(cls, depth):
    torch.manual_seed(0)
    stage = BlockStage(*(nn.Identity() for _ in range(depth)))
    for i in range(depth):
        stage.attach(i, cls(8, head_dim=4))
    return stage


@pytest.mark.parametrize('form', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('state', list(AttentionState))
def test_published_form_is_mrla_base(form, state):
    ours, published = stage_of(MRLABase, 4), stage_of(PublishedMRLABase, 4)
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


# -- rounds ----------------------------------------------------------------


def test_rounds_take_turns():
    calls = []
    actions = {n: lambda n=n: calls.append(n) for n in 'abc'}
    times = rounds.run_rounds(actions, 3, CPU, steps=2)
    assert ''.join(calls) == 'aabbccbbccaaccaabb'
    assert {n: len(t) for n, t in times.items()} == dict(a=3, b=3, c=3)


def test_the_clock_of_the_cpu_does_not_count_waiting():
    actions = dict(waits=lambda: time.sleep(0.2))
    (wall,) = rounds.run_rounds(actions, 1, CPU)['waits']
    (cpu,) = rounds.run_rounds(actions, 1, CPU, clock='cpu')['waits']
    assert cpu < 0.1 < 0.2 <= wall


def test_statistics():
    found = rounds.summary([1.0, 2.0, 3.0, 4.0, 10.0], [1.0] * 5)
    assert found['median'] == 3 and found['iqr'] == 2
    assert rounds.summary([2.0], [1.0])['iqr'] == 0
    # A machine that slows down: each round has the same ratio
    slow = rounds.summary([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert slow['ratio'] == 2 and slow['ratio_iqr'] == 0
    assert rounds.noisy(dict(a=found, b=dict(median=1, iqr=0.1))).endswith(': a')
    assert rounds.noisy(dict(b=dict(median=1, iqr=0.1))) == ''


def test_busy_machine_is_told(monkeypatch):
    for load, busy in ((1e4, True), (0.0, False)):
        monkeypatch.setattr(os, 'getloadavg', lambda load=load: (load, 0, 0))
        about = rounds.machine(CPU)
        assert about['busy'] == busy
        assert ('BUSY' in rounds.describe(about)) == busy


# -- networks --------------------------------------------------------------


def network(*options):
    return networks.Network(compare.parse_args([*TINY, *map(str, options)]))


def pruned_in(*options):
    model = network(*options).build('ela')
    return [
        name.split('.', 1)[1].rsplit('.', 1)[0]
        for name, a in layer_attentions(model).items()
        if a.attention_state == AttentionState.PRUNED
    ]


def test_what_is_pruned(tmp_path):
    assert pruned_in() == ['layer1.1', 'layer2.1', 'layer3.1']
    full = 'backbone.layer3.1.layer_attn'
    assert pruned_in('--prune', 'layer2.1', full) == ['layer2.1', 'layer3.1']
    layer = LayerDecision('backbone.layer1.1.layer_attn', 'layer1', pruned=True)
    write_decisions(
        tmp_path,
        [
            PruningDecision(
                (x,), dict(type='EBQM'), window=(1, 1), unit='epoch', iteration=1
            )
            for x in (layer, replace(layer, name=full))
        ],
    )
    assert pruned_in('--prune', tmp_path / 'pruning.json') == ['layer1.1', 'layer3.1']


def test_variants_start_alike():
    """Parameters of one name have one value, whatever is built first."""
    tiny = network('--variants', 'kcla', 'plain', 'mrla-base', 'mrla-light')
    states = [tiny.build(v).state_dict() for v in tiny.args.variants]
    for state in states[1:]:
        for key, value in state.items():
            known = next(s[key] for s in states if key in s)
            if known.shape == value.shape:
                torch.testing.assert_close(value, known, rtol=0, atol=0)
    assert not any('layer_attn' in key for key in states[1])
    assert set(states[1]) <= set(states[2]) > set()


@pytest.mark.parametrize(
    'config, batch',
    [
        ('mmpretrain::vision_transformer/vit-base-p16_32xb128-mae_in1k.py', 8),
        ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 2),
        ('faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py', 2),
    ],
)
def test_any_config(config, batch, config_dir):
    if 'vision' not in config:
        pytest.importorskip('mmdet')
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    net = config if '::' in config else str(config_dir / config)
    args = compare.parse_args(['--net', net, '--head-dim', '16'])
    found = networks.Network(args)
    assert args.batch == batch
    if 'vision' in config:  # a large one: built once
        assert layer_attentions(found.build('mrla-base'))
        return
    assert not layer_attentions(found.build('plain'))
    assert args.size == (800, 1333)
    args.size = (64, 64)
    contestant = networks.Contestant('ela', found, CPU)
    attentions = layer_attentions(contestant.model).values()
    assert 0 < sum(a.active for a in attentions) < len(attentions)
    assert {a.head_dim for a in attentions} == {16}
    assert contestant.train_step().isfinite()
    contestant.model.eval()
    assert len(contestant.infer()) == 2


def test_wrong_options_are_one_line(tmp_path, capsys):
    path = tmp_path / 'pruning.json'
    path.write_text('{"layers": []}')
    nothing = tmp_path / 'nothing.py'
    nothing.write_text('a = 1')
    for options, text in (
        (['--variants', 'mrla'], "'mrla' is unknown"),
        (['--variants', 'kcla:compile'], "'kcla:compile'"),
        (['--clock', 'cpu', '--device', 'meta'], '--clock=cpu does not measure'),
        (['--variants', 'ela', 'ela'], 'twice'),
        (['--batch', '0'], '--batch=0'),
        (['--prune', path], 'pruning.json'),
        (['--prune', path, 'layer1.0'], 'one pruning.json'),
        (['--prune', 'layer9.0'], "no layer attention 'layer9.0'"),
        (['--device', 'cpuu'], '--device=cpuu'),
        (['--net', 'r51'], '51'),
        (['--net', nothing], 'nothing.py'),
        (['--net', tmp_path / 'nowhere.py'], 'nowhere.py'),
        (['--net', 'mmdet::nowhere.py'], 'nowhere.py'),
        (['--out', tmp_path], str(tmp_path)),
    ):
        with pytest.raises(SystemExit) as error:
            compare.main([*TINY, *map(str, options)])
        message = str(error.value)
        assert message.startswith('error: ') and text in message, options
        assert '\n' not in message


# -- the tools -------------------------------------------------------------


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    """Results and tables of all variants."""
    out = tmp_path_factory.mktemp('compared') / 'new' / 'results.json'
    variants = [*networks.VARIANTS, 'ela:compile']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, 'COMPILER', 'eager')
        torch._dynamo.reset()
        args = [*TINY, '--channels-last', '--variants', *variants, '--out', str(out)]
        results = compare.compare(compare.parse_args(args))
    assert json.loads(out.read_text())['training'].keys() == set(variants)
    return results


@pytest.mark.parametrize('mode', compare.MODES)
def test_compare(compared, mode):
    found = compared[mode]
    for name, result in found.items():
        assert len(result['times']) == 2
        assert result['peak_bytes'] > 4 * result['parameters']
        assert result['attentions'] == (0 if name == 'plain' else 6)
        assert result['active'] == (3 if 'ela' in name else result['attentions'])
        assert (result['graphs'] > 0) == (name == 'ela:compile')
    assert found['plain']['ratio'] == 1
    # One function in two forms, one of which copies
    ours, published = found['mrla-base'], found['published']
    assert ours['parameters'] == published['parameters']
    assert ours['peak_bytes'] < published['peak_bytes']
    if mode == 'training':
        assert ours['loss'] == pytest.approx(published['loss'], rel=1e-5)
        compiled = found['ela:compile']['loss']
        assert compiled == pytest.approx(found['ela']['loss'], rel=1e-5)
    table = compare.table(compared, mode)
    assert table.startswith(f'{mode}: cifar20, 16x16, batch 2, fp32, channels_last')
    rows = [line.split('|')[1].strip() for line in table.splitlines() if '|' in line]
    assert rows[2:] == list(found)


def test_one_mode_in_half_precision(capsys):
    compare.main(
        [*TINY, '--mode', 'inference', '--dtype', 'bf16', '--variants', 'kcla', 'plain']
    )
    printed = capsys.readouterr().out
    assert 'training' not in printed and 'x kcla' in printed


def test_hook_overhead(tmp_path, capsys):
    out = tmp_path / 'hook.json'
    args = [*TINY, '--net', 'cifar38', '--imports', '1', '--out', str(out)]
    hook_overhead.main(args)
    results = json.loads(out.read_text())
    assert list(results['steps']) == ['no hook', 'outside', 'inside']
    assert len(results['imports']) == 2
    assert results['measuring'] > 0
    assert 'measuring alone' in capsys.readouterr().out


@pytest.mark.parametrize(
    'variants, text', [(['plain'], 'plain'), (['ela', 'mrla-base'], 'give exactly one')]
)
def test_hook_overhead_needs_what_can_be_pruned(variants, text):
    with pytest.raises(SystemExit, match=f'^error: .*{text}'):
        hook_overhead.main([*TINY, '--variants', *variants])
