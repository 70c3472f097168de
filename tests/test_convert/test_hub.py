"""`mmela push` to a stand-in for the Hub, and what it has written there."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader

from mmela.convert.hub import report_until, shared_config
from mmela.hooks import LayerAttentionPruningHook
from mmela.layers import AttentionState
from mmela.layers.state import encode
from mmela.pruning import LayerDecision, PruningDecision, PruningReport
from mmela.tools.push import main
from tests.helpers.networks import classifier, save

pytest.importorskip('mmpretrain')
huggingface_hub = pytest.importorskip('huggingface_hub')

PRUNED = 'backbone.layer1.1.layer_attn'


def push(*args):
    main(list(map(str, args)))


def decision(iteration, name, gone=None):
    layers = tuple(
        LayerDecision(f'{stage}.{block}.layer_attn', stage, 0.25 * iteration)
        for stage in ('backbone.layer1', 'backbone.layer2')
        for block in range(2)
    )
    layers = tuple(
        LayerDecision(**{**x.to_dict(), 'pruned': x.name == name})
        for x in layers
        if x.name != gone
    )
    where = dict(window=(iteration, iteration), unit='epoch', iteration=iteration)
    return PruningDecision(layers, dict(type='EBQM'), **where)


@pytest.fixture
def run(tmp_path):
    """Config and checkpoint in a work directory, after 2 of 3 epochs."""
    model = classifier()
    model['val_dataloader'] = dict(dataset=dict(type='CIFAR10'))
    model['load_from'] = '/home/ann/start.pth'
    model['model']['backbone']['init_cfg'] = dict(
        type='Pretrained', checkpoint='/home/ann/resnet.pth'
    )
    config, checkpoint = save(tmp_path, 'net', model)
    state_dict = torch.load(checkpoint)['state_dict']
    state_dict[f'{PRUNED}.state'].fill_(encode(AttentionState.PRUNED))
    state_dict['backbone.layer2.0.layer_attn.state'].fill_(
        encode(AttentionState.VALUE_ONLY)
    )
    meta = dict(epoch=2, iter=2, dataset_meta=dict(classes=('a', 'b', 'c', 'd')))
    torch.save(dict(meta=meta, state_dict=state_dict, optimizer=1), checkpoint)
    logs = tmp_path / '20260101_000000' / 'vis_data'
    logs.mkdir(parents=True)
    lines = []
    for epoch in (1, 2, 3):
        lines.append(dict(loss=1.0, epoch=epoch, iter=epoch, step=epoch, time=1.0))
        lines.append({'accuracy/top1': 70.0 + epoch, 'time': 1.0, 'step': epoch})
    (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    settings = LayerAttentionPruningHook(windows=[(1, 1), (3, 3)]).settings
    report = PruningReport(
        settings, (decision(1, PRUNED), decision(3, None, gone=PRUNED))
    )
    report.write(tmp_path / 'pruning.json')
    return config, checkpoint


def test_push(hub, run, capsys):
    push(*run, 'ann/net', '--license', 'mit', '--private')
    assert capsys.readouterr().out.strip() == f'{hub.url}/ann/net'
    assert hub.private == {'ann/net': True}
    files = hub.repos['ann/net']
    assert set(files) == {'README.md', 'config.py', 'model.safetensors', 'pruning.json'}
    assert sum('/commit/' in request for request in hub.requests) == 1

    card = huggingface_hub.ModelCard(files['README.md'].decode())
    assert card.data.license == 'mit' and card.data.library_name == 'mmela'
    assert card.data.pipeline_tag == 'image-classification'
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ('accuracy/top1', 72.0)
    assert result.dataset_type == 'CIFAR10'
    assert '| accuracy/top1 | 72 |' in card.content
    assert '| backbone.layer1 | 0 ~~1~~ |' in card.content
    assert '| backbone.layer2 | (0) 1 |' in card.content
    assert '7 of 8 attentions are left after epoch 2' in card.content
    # The decision after epoch 3 is not that of this checkpoint.
    assert '## Pruning after epoch 1\n' in card.content
    assert card.content.count('## Pruning') == 1
    report = json.loads(files['pruning.json'])
    assert [d['iteration'] for d in report['decisions']] == [1]


def test_what_was_pushed_works(hub, run, tmp_path):
    """The network from the Hub gives what the one on disk does."""
    push(*run, 'ann/net')
    config = tmp_path / 'from_the_hub.py'
    config.write_bytes(hub.repos['ann/net']['config.py'])
    assert '/home/ann' not in config.read_text()
    checkpoint = CheckpointLoader.load_checkpoint('hf://ann/net')
    assert checkpoint['meta']['dataset_meta']['classes'] == ['a', 'b', 'c', 'd']
    x = torch.rand(2, 3, 32, 32)
    outs = []
    for cfg, state_dict in (
        (Config.fromfile(run[0]), torch.load(run[1])['state_dict']),
        (Config.fromfile(config), checkpoint['state_dict']),
    ):
        init_default_scope('mmpretrain')
        model = MODELS.build(cfg.model)
        model.load_state_dict(state_dict)
        outs.append(model.eval()(x))
    assert torch.equal(*outs)


def test_folder_and_metrics(run, tmp_path, capsys):
    (tmp_path / 'm.json').write_text('{"accuracy/top1": 12.5, "name": "x"}')
    out = tmp_path / 'repo'
    push(*run, 'ann/net', '--out', out, '--metrics', tmp_path / 'm.json')
    assert 'README.md, config.py, model.safetensors' in capsys.readouterr().out
    assert '| accuracy/top1 | 12.5 |' in (out / 'README.md').read_text()
    with pytest.raises(SystemExit, match='repo already exists'):
        push(*run, 'ann/net', '--out', out)


def test_elsewhere_there_is_nothing(run, tmp_path, capsys):
    other = tmp_path / 'other'
    other.mkdir()
    push(*run, 'ann/net', '--out', tmp_path / 'repo', '--work-dir', other)
    assert 'has no metrics for this checkpoint' in capsys.readouterr().out
    card = (tmp_path / 'repo' / 'README.md').read_text()
    assert '## Metrics' not in card and '## Pruning' not in card
    assert not (tmp_path / 'repo' / 'pruning.json').exists()


def test_errors_are_one_line(hub, run, tmp_path, monkeypatch):
    (tmp_path / 'm.json').write_text('[]')
    for args, match in [
        (('net',), "error: 'net' does not have the form USER/REPO"),
        (('ann/net!',), 'error: Repo id must use alphanumeric'),
        (('ann/net', '--metrics', tmp_path / 'm.json'), 'm.json is not a JSON object'),
        (('ann/net', '--metrics', tmp_path / 'none.json'), 'No such file'),
    ]:
        with pytest.raises(SystemExit, match=match) as error:
            push(*run, *args)
        assert '\n' not in str(error.value)
    assert not hub.repos
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(SystemExit, match='error: ann/net cannot be uploaded: .*401'):
        push(*run, 'ann/net')
    assert not hub.repos


def test_report_until(run, tmp_path):
    for iteration, expected in ((None, [1, 3]), (2, [1]), (0, [])):
        report = report_until(tmp_path, iteration)
        assert [d.iteration for d in report.decisions] == expected
    assert report_until(tmp_path / 'none') is None


def test_shared_config():
    start = dict(type='Pretrained', checkpoint='/x.pth')
    model = dict(
        backbone=dict(depth=18, init_cfg=start),
        heads=[dict(init_cfg=start), dict(init_cfg=dict(type='Normal'))],
    )
    cfg = Config(dict(model=model, work_dir='w', load_from='x', data_root='d'))
    shared = shared_config(cfg)
    assert shared.to_dict() == dict(
        model=dict(
            backbone=dict(depth=18, init_cfg=None),
            heads=[dict(init_cfg=None), dict(init_cfg=dict(type='Normal'))],
        ),
        data_root='d',
    )
    assert cfg.model.backbone.init_cfg == start


def test_shared_config_names_no_folder_of_this_machine():
    root = '/home/ann/coco'
    dataset = dict(data_root=f'{root}/', ann_file='annotations/val.json')
    cfg = Config(
        dict(
            model=dict(type='A', text='/home/ann/coconut'),
            data_root=root,
            test_dataloader=dict(dataset=dict(datasets=[dataset])),
            test_evaluator=dict(ann_file=f'{root}/annotations/val.json'),
            other_dataset=dict(data_root='data/voc/'),
        )
    )
    shared = shared_config(cfg)
    assert shared.model.text == '/home/ann/coconut'
    assert shared.data_root == 'data/coco'
    moved = shared.test_dataloader.dataset.datasets[0]
    assert moved == dict(data_root='data/coco/', ann_file='annotations/val.json')
    assert shared.test_evaluator.ann_file == 'data/coco/annotations/val.json'
    assert shared.other_dataset.data_root == 'data/voc/'
