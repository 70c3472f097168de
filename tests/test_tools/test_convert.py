"""tools/convert: slim, prune and export, on a small classifier or detector."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from mmela.analysis.inputs import load_network
from mmela.layers import AttentionState
from mmela.structure import layer_attentions, prune
from tests.helpers.networks import classifier, save

pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

from mmdet.registry import MODELS  # noqa: E402

TOOLS = Path(__file__).resolve().parents[2] / 'tools' / 'convert'
PRUNED = ['backbone.layer2.1.layer_attn', 'backbone.layer3.2.layer_attn']


def tool(name, *args):
    runpy.run_path(str(TOOLS / f'{name}.py'))['main'](list(map(str, args)))


@pytest.fixture
def network(tmp_path, config_dir):
    """A pruned Faster R-CNN: its config and checkpoint."""
    name = 'faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py'
    cfg = Config.fromfile(config_dir / name)
    cfg.model.backbone.update(
        depth=34,
        base_channels=8,
        init_cfg=None,
        layer_attention=dict(type='MRLABase', head_dim=8),
    )
    cfg.model.neck.update(in_channels=[8, 16, 32, 64])
    cfg.model.roi_head.bbox_head.fc_out_channels = 16
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    prune(model, PRUNED)
    cfg.dump(tmp_path / 'config.py')
    torch.save(
        dict(meta=dict(epoch=3), state_dict=model.state_dict(), optimizer=1),
        tmp_path / 'checkpoint.pth',
    )
    return tmp_path / 'config.py', tmp_path / 'checkpoint.pth', model


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_slim(network, tmp_path, suffix):
    config, checkpoint, model = network
    tool('slim', config, checkpoint, tmp_path / f'slim{suffix}')
    slim_cfg = Config.fromfile(tmp_path / 'slim.py')
    saved = CheckpointLoader.load_checkpoint(str(tmp_path / f'slim{suffix}'))
    assert saved['meta'] == dict(epoch=3)
    assert slim_cfg.custom_hooks == []
    kept = [
        [int(name.split('.')[1]) for name in stage if not name.startswith('!')]
        for stage in slim_cfg.model.backbone.blocks
    ]
    # The frozen stage has none.
    assert kept == [[0, 2, 3], [0, 1, 3, 4, 5], [0, 1, 2]]
    slim = MODELS.build(slim_cfg.model)
    slim.load_state_dict(saved['state_dict'])  # no key missing or unexpected
    assert 'optimizer' not in saved
    assert not any(key.startswith(tuple(PRUNED)) for key in slim.state_dict())
    model.eval()
    slim.eval()
    x = torch.rand(2, 3, 65, 97)
    for a, b in zip(model.extract_feat(x), slim.extract_feat(x)):
        assert torch.equal(a, b)


def test_slim_keeps_values_that_are_seen(network, tmp_path):
    config, checkpoint, model = network
    prune(model, ['backbone.layer2.2.layer_attn'], keep_value=True)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    tool('slim', config, checkpoint, tmp_path / 'slim.pth')
    slim = MODELS.build(Config.fromfile(tmp_path / 'slim.py').model)
    slim.load_state_dict(torch.load(tmp_path / 'slim.pth')['state_dict'])
    assert (
        slim.backbone.layer2[2].layer_attn.attention_state == AttentionState.VALUE_ONLY
    )


@pytest.mark.parametrize('suffix', ['.onnx', '.pt'])
def test_export(network, tmp_path, capsys, suffix):
    config, checkpoint, model = network
    out = tmp_path / f'backbone{suffix}'
    tool('export', config, checkpoint, out, '--backbone', '--size', '64', '96')
    said = capsys.readouterr().out.strip().splitlines()[-1]
    megabytes = out.stat().st_size / 1e6
    assert said == (
        f'{out}: {megabytes:.1f} MB, without 2 pruned of 13 layer attentions'
    )
    if suffix == '.onnx':
        onnxruntime = pytest.importorskip('onnxruntime')
        session = onnxruntime.InferenceSession(str(out))

        def run(x):
            return session.run(None, dict(x=x.numpy()))
    else:
        run = torch.jit.load(str(out))
    model.eval()
    for shape in [(2, 3, 64, 96), (1, 3, 64, 64), (3, 3, 97, 129)]:
        x = torch.rand(shape)
        with torch.no_grad():
            expected, found = model.backbone(x), run(x)
        assert len(found) == len(expected) == 4
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_export_of_a_classifier(tmp_path):
    """MMPretrain's configs have the pre-processing beside the model."""
    pytest.importorskip('mmpretrain')
    if not hasattr(torch.export.Dim, 'DYNAMIC'):
        pytest.skip('needs torch 2.6')
    cfg = classifier()
    cfg['data_preprocessor'] = cfg['model'].pop('data_preprocessor')
    config, checkpoint = save(tmp_path, 'narrow', cfg)
    tool('export', config, checkpoint, tmp_path / 'x.pt2', '--size', '32', '64')
    _, model = load_network(config, checkpoint, device='cpu')
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    (found,) = torch.export.load(tmp_path / 'x.pt2').module()(images)
    with torch.no_grad():  # normalized by hand
        expected = model((images - 127.5) / 50, mode='tensor').softmax(-1)
    torch.testing.assert_close(found, expected)


def test_prune_after_training(network, tmp_path, shapes):
    config, checkpoint, _ = network
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    options = [
        f'test_dataloader.dataset.data_root={shapes}/',
        'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
        'test_dataloader.dataset.pipeline.1.scale=(96,96)',
    ]
    tool(
        'prune',
        config,
        checkpoint,
        tmp_path / 'pruned.pth',
        '--policy',
        'type=FixedCount',
        'count=4',
        '--batches',
        '2',
        '--cfg-options',
        *options,
    )
    state_dict = torch.load(tmp_path / 'pruned.pth')['state_dict']
    model.load_state_dict(state_dict)
    found = [
        name
        for name, attention in layer_attentions(model).items()
        if not attention.active
    ]
    report = json.loads((tmp_path / 'pruned.json').read_text())
    assert len(found) == 4 and set(found) == set(report['pruned'])
    layers = [x for x in report['layers'] if x['divergence'] is not None]
    kl = sorted((x['divergence'], x['name']) for x in layers)
    assert {name for _, name in kl[:4]} == set(found)
    # Beside a run, its report is not taken for that of the tool.
    (tmp_path / 'pruning.json').write_text('of the run')
    with pytest.raises(SystemExit, match='pruning.json already exists'):
        tool('prune', config, checkpoint, tmp_path / 'pruning.pth')
    assert (tmp_path / 'pruning.json').read_text() == 'of the run'


def test_errors_are_one_line(network, tmp_path):
    config, checkpoint, _ = network
    plain = tmp_path / 'plain.pth'
    torch.save(dict(state_dict=dict(x=torch.zeros(1))), plain)
    for name, args, match in [
        ('slim', (config, 'nowhere.pth', 'out.pth'), 'there is no file nowhere.pth'),
        ('slim', (config, plain, 'out.pth'), 'plain.pth does not fit'),
        ('slim', (config, checkpoint, checkpoint), 'already exists'),
        ('slim', (config, checkpoint, 'out.py'), 'both checkpoint and config'),
        ('prune', (config, checkpoint, 'out.json'), 'out.json must not end'),
        ('export', (config, plain, 'out.onnx', '--backbone'), 'has no backbone'),
        ('export', (config, plain, 'out.onnx'), 'plain.pth does not fit'),
        ('export', (config, checkpoint, 'out.xyz'), 'must end with .onnx'),
        (
            'export',
            (config, checkpoint, 'o.pt', '--backbone', '--normalized'),
            'remove --normalized',
        ),
        ('prune', (config, 'nowhere.pth', 'out.pth'), 'there is no file nowhere.pth'),
        ('prune', (config, checkpoint, 'out.pth', '--batches', '0'), 'batches=0'),
        (
            'prune',
            (config, checkpoint, 'out.pth', '--policy', 'type=EBQM', 'mu=7'),
            'mu=7',
        ),
    ]:
        with pytest.raises(SystemExit, match=match) as error:
            tool(name, *args)
        assert '\n' not in str(error.value)
