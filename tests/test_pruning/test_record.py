"""Files of decisions, of today and of version 0.1, sound and not."""

import json

import pytest

from mmela.pruning import LayerDecision, PruningDecision, PruningReport
from mmela.pruning.record import keep_earlier

# As version 0.1 wrote it, shortened to one stage
OLD = dict(
    hook=dict(
        windows=[[1, 1]],
        by_epoch=True,
        policy=dict(type='EBQM', mu=0.9),
        keep_value=False,
        reduction='mean_kl',
        eps=1e-08,
    ),
    prunings=[
        dict(
            window=[1, 1],
            unit='epoch',
            iteration=3,
            layers=[
                dict(
                    name='backbone.layer1.0.layer_attn',
                    kl=None,
                    normalized=None,
                    mapped=None,
                    threshold=0.9,
                    skip=False,
                    reason='kept: first of its stage, not measured',
                    stage='backbone.layer1',
                ),
                dict(
                    name='backbone.layer1.1.layer_attn',
                    kl=0.25,
                    normalized=0.0,
                    mapped=0.0,
                    threshold=0.9,
                    skip=True,
                    reason='pruned: 0 < 0.9',
                    stage='backbone.layer1',
                ),
                dict(
                    name='backbone.layer1.2.layer_attn',
                    kl=0.5,
                    normalized=None,
                    mapped=None,
                    threshold=0.9,
                    skip=False,
                    reason='kept: above the quantile',
                    stage='backbone.layer1',
                ),
            ],
            pruned=['backbone.layer1.1.layer_attn'],
            active=['backbone.layer1.0.layer_attn', 'backbone.layer1.2.layer_attn'],
        )
    ],
)


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_old_form(tmp_path):
    report = PruningReport.read(written(tmp_path / 'pruning.json', OLD))
    (decision,) = report.decisions
    assert list(decision.pruned) == OLD['prunings'][0]['pruned']
    assert list(decision.active) == OLD['prunings'][0]['active']
    assert decision.policy == dict(type='EBQM', mu=0.9)
    assert (decision.eps, decision.reduction) == (1e-8, 'mean_kl')
    assert (decision.window, decision.unit, decision.iteration) == ((1, 1), 'epoch', 3)
    assert [x.divergence for x in decision.layers] == [None, 0.25, 0.5]
    assert [x.selected for x in decision.layers] == [False, True, False]
    # Read and written it is one of today.
    report.write(tmp_path / 'pruning.json')
    assert json.loads((tmp_path / 'pruning.json').read_text())['format'] == 2
    assert PruningReport.read(tmp_path / 'pruning.json') == report


def test_each_decision_has_its_own_policy(tmp_path):
    """Also where another one was set on a resume."""
    layers = (LayerDecision('a.0.layer_attn', 'a'),)
    first, second = [
        PruningDecision(layers, policy, 'mean_kl', eps, False, (n, n), 'epoch', n)
        for n, policy, eps in ((1, dict(type='A'), 1e-8), (2, dict(type='B'), 1e-6))
    ]
    hook = dict(OLD['hook'], policy=second.policy)
    PruningReport(hook, (first, second)).write(tmp_path / 'pruning.json')
    found = PruningReport.read(tmp_path / 'pruning.json').decisions
    assert found == (first, second)


def change(**kwargs):
    content = json.loads(json.dumps(OLD))
    for key, value in kwargs.items():
        part, _, name = key.partition('__')
        place = dict(
            hook=content['hook'],
            decision=content['prunings'][0],
            layer=content['prunings'][0]['layers'][1],
            file=content,
        )[part]
        place[name] = value
    return content


@pytest.mark.parametrize(
    'content, match',
    [
        ('', 'Expecting value'),
        ('{"hook": ', 'Expecting value'),
        ('[' * 100_000, 'pruning.json'),
        ([], 'the content'),
        ({}, 'hook'),
        (dict(OLD, format=3), 'format=3 is not 1 or 2'),
        (dict(OLD, format=2), 'decisions=None'),
        (change(hook__windows='1-3'), 'windows'),
        (change(hook__windows=[[1]]), 'pair of integers'),
        (change(hook__policy=None), 'policy'),
        (change(hook__windows=[[1, True]]), 'window=True'),
        (change(file__prunings={}), 'prunings'),
        (change(decision__window=[1, '/../../../outside/x']), 'outside'),
        (change(decision__window=[1, 10**400]), 'window=1000'),
        (change(layer__kl=10**400), 'divergence=1000'),
        (change(decision__window=None), 'no window'),
        (change(decision__unit='../epoch'), 'unit'),
        (change(decision__iteration='3'), 'iteration'),
        (change(decision__layers=None), 'layers'),
        (change(decision__layers=[3]), 'a layer'),
        (change(decision__layers=[{}]), 'name'),
        (change(layer__name='../../etc'), 'not a module name'),
        (change(layer__name='a\x1b[31m'), r"'a\\x1b\[31m' is not a module name"),
        (change(layer__stage='<b>'), 'not a module name'),
        (change(layer__kl='0.1'), "divergence='0.1'"),
        (change(layer__kl=float('nan')), 'not finite'),
        (change(layer__kl=None), 'no divergence'),
        (change(layer__mapped=None), 'both normalized and mapped'),
        (change(layer__skip=1), 'pruned=1'),
        (change(layer__reason=None), 'reason'),
    ],
)
def test_what_is_no_report(tmp_path, content, match):
    path = written(tmp_path / 'pruning.json', content)
    with pytest.raises(ValueError, match=match) as error:
        PruningReport.read(path)
    assert str(error.value).startswith(f'{path} is not a report of the pruning hook: ')


def test_keep_earlier(tmp_path):
    path = tmp_path / 'pruning.json'
    keep_earlier(path)
    path.write_text('earlier')
    keep_earlier(path)
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() == 'earlier' and kept.name.startswith('pruning_2')
