import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from mmela.analysis import make_report, summarize
from tests.toy import toy_config, train

HOOK = dict(windows=[(1, 1), (3, 3)], policy=dict(type='EBQM', mu=0.9))


class Sources(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, html):
        super().__init__()
        self.sources, self.text = [], ''
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ('src', 'href')]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    cfg = toy_config(tmp_path_factory.mktemp('run'), HOOK)
    return train(
        cfg,
        val_dataloader=dict(
            cfg.train_dataloader,
            sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg=dict(),
        val_evaluator=dict(type='ToyMetric', prefix='toy'))


def test_report(run):
    path = make_report(run.work_dir)
    page = Sources(path.read_text(encoding='utf-8'))
    assert page.sources
    for source in page.sources:
        data = re.fullmatch('data:image/png;base64,(.*)', source)[1]
        assert base64.b64decode(data).startswith(b'\x89PNG')
    with open(f'{run.work_dir}/pruning.json') as file:
        prunings = json.load(file)['prunings']
    for pruning in prunings:
        for layer in pruning['layers']:
            assert layer['reason'] in page.text
            if layer['kl'] is not None:
                assert f'{layer["kl"]:.4g}' in page.text
    assert 'LayerAttentionPruningHook' in page.text
    pictures = {p.name for p in (path.parent / 'pictures').iterdir()}
    assert pictures == {
        'metrics.png', 'pruning_epoch_1.png', 'pruning_epoch_3.png'
    }


def test_summary(run):
    make_report(run.work_dir)
    text = summarize(run.work_dir)
    assert f'{run.work_dir}/epoch_4.pth' in text
    assert 'After epoch 1: 8 -> ' in text
    assert 'Epoch 4: toy/mean ' in text


def test_run_without_pruning_or_metrics(tmp_path):
    train(toy_config(tmp_path, layer_attention=None, epochs=1))
    page = Sources(make_report(tmp_path).read_text(encoding='utf-8'))
    assert 'Nothing was pruned' in page.text
    assert 'no validation metrics' in page.text


def test_resumed_run_is_one_run(tmp_path, run):
    """Each start has a folder of its own."""
    torch.save(
        torch.load(f'{run.work_dir}/epoch_2.pth'), tmp_path / 'epoch_2.pth')
    (tmp_path / '20000101_000000' / 'vis_data').mkdir(parents=True)
    scalars = [dict(loss=7., step=1), dict(loss=8., step=7)]
    (tmp_path / '20000101_000000' / 'vis_data' / 'scalars.json').write_text(
        '\n'.join(map(json.dumps, scalars)))
    train(
        toy_config(
            tmp_path,
            HOOK,
            load_from=str(tmp_path / 'epoch_2.pth'),
            resume=True))
    from mmela.analysis.report import Run
    losses = Run(tmp_path).losses
    assert losses[1] == 7. and losses[7] != 8.
    assert sorted(losses) == [1, *range(7, 13)]


def test_html_in_names_is_escaped(tmp_path, run):
    make_report(run.work_dir)
    train(toy_config(tmp_path, layer_attention=None, epochs=1))
    (tmp_path / 'config.py').write_text("x = '<script>alert(1)</script>'")
    assert '<script>' not in make_report(tmp_path).read_text()


def test_no_work_dir(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        make_report(tmp_path)
