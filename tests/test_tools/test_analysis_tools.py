"""tools/analysis: layer_attention, cam and what the report makes of it."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

import mmela.analysis
from mmela.analysis import make_report
from mmela.analysis.inputs import evenly, find_images
from tests.helpers.measurements import SMALL, measurement
from tests.helpers.networks import BACKBONE, classifier, needs_grad_cam, save
from tests.helpers.pages import Page, check_offline
from tests.helpers.toy import toy_config, train

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmcv.ops', exc_type=ImportError)


TOOLS = Path(__file__).resolve().parents[2] / 'tools' / 'analysis'
PRUNED = ['backbone.layer1.1.layer_attn', 'backbone.layer3.1.layer_attn']


def tool(name, *args):
    arguments = ['--device', 'cpu', *map(str, args)]
    runpy.run_path(str(TOOLS / f'{name}.py'))['main'](arguments)


@pytest.fixture
def images(tmp_path):
    """A folder of three random images of several formats and sizes."""
    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (('b.jpg', 50), ('a.PNG', 40), ('c.bmp', 60)):
        pixels = rng.integers(0, 255, (size, 45, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture
def network(tmp_path):
    return save(tmp_path, 'cls', classifier(), PRUNED)


def test_classifier_on_a_folder(network, images, tmp_path, capsys):
    config, checkpoint = network
    checkpoint = checkpoint.with_name('cls_pruned.pth')
    tool('layer_attention', config, checkpoint, '--data', images, '--num-images', 2)
    out = tmp_path / 'layer_attention' / 'cls_pruned'
    result = json.loads((out / 'layer_attention.json').read_text())
    assert result['images'] == 2 and result['config'] == 'cls.py'
    stages = result['stages']
    assert list(stages) == [f'backbone.layer{i}' for i in range(1, 5)]
    assert stages['backbone.layer3']['states'] == ['active', 'pruned']
    assert stages['backbone.layer4']['maps']['mean'][0] == [1.0, None]
    names = {p.stem for p in out.glob('*.png')}
    assert {'maps_layer4', 'heads_layer4', 'kl', 'features'} <= names
    assert {n for n in names if n.endswith('_dark')} == {
        f'{n}_dark' for n in names if not n.endswith('_dark')
    }
    text = capsys.readouterr().out
    assert '6 of 8 attentions are active' in text
    assert 'already pruned' in text and str(out) in text
    # One of the two divergences is above the quantile.
    assert 'Left out: curve of the policy' in text


def test_no_distribution(tmp_path, images, capsys):
    config, checkpoint = save(
        tmp_path,
        'light',
        classifier(layer_attention=dict(type='MRLALight', head_dim=8)),
    )
    out = tmp_path / 'out'
    tool(
        'layer_attention', config, checkpoint, '--data', images / 'b.jpg', '--out', out
    )
    assert {p.name for p in out.iterdir()} == {
        f'{n}{t}.png'
        for n in ('features', 'contributions', 'keys', 'queries')
        for t in ('', '_dark')
    } | {'layer_attention.json'}
    assert 'Left out: attention maps' in capsys.readouterr().out


def detector(shapes):
    """A small RetinaNet with the validation data of the fixture."""
    cfg = Config.fromfile(
        Path(__file__).resolve().parents[2]
        / 'configs/faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py'
    )
    cfg.model = dict(
        type='RetinaNet',
        data_preprocessor=cfg.model.data_preprocessor,
        backbone=dict(BACKBONE, norm_cfg=dict(type='BN', requires_grad=False)),
        neck=dict(
            type='FPN',
            in_channels=[8, 16, 32, 64],
            start_level=1,
            out_channels=8,
            num_outs=3,
        ),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=80,
            in_channels=8,
            stacked_convs=1,
            feat_channels=8,
            anchor_generator=dict(
                type='AnchorGenerator', ratios=[1.0], scales=[4], strides=[8, 16, 32]
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        ),
        test_cfg=dict(
            nms_pre=50,
            min_bbox_size=0,
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=5,
        ),
    )
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = f'{shapes}/'
        loader.dataset.pipeline[1].scale = (96, 96)
    return cfg


def test_detector_on_its_validation_data(tmp_path, shapes, capsys):
    config, checkpoint = save(tmp_path, 'det', detector(shapes))
    out = tmp_path / 'out'
    tool('layer_attention', config, checkpoint, '--out', out, '--num-images', 2)
    result = json.loads((out / 'layer_attention.json').read_text())
    assert result['images'] == 2 and result['data'] == 'validation data'
    # The policy of the config's hook
    assert result['decision']['policy']['mu'] == 0.2
    assert 'custom_hooks of the config' in capsys.readouterr().out


def test_detector_cam(tmp_path, shapes, capsys):
    needs_grad_cam()
    config, checkpoint = save(tmp_path, 'det', detector(shapes), PRUNED)
    image = next((shapes / 'val2017').iterdir())
    tool(
        'cam',
        config,
        checkpoint,
        image,
        '--layers',
        'layer1.1',
        '--max-channels',
        3,
        '--batch-size',
        2,
        '--score-thr',
        0,
        '--compare',
        config,
        tmp_path / 'det_pruned.pth',
        '--out',
        tmp_path / 'cam',
    )
    with Image.open(tmp_path / 'cam' / f'0_{image.stem}.png') as picture:
        assert picture.width > picture.height
    assert f'0_{image.stem}.png' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='nothing is detected .* at least 0.99'):
        tool(
            'cam',
            config,
            checkpoint,
            image,
            '--score-thr',
            0.99,
            '--out',
            tmp_path / 'cam',
        )


def test_classifier_cam(network, images, tmp_path):
    needs_grad_cam()
    tool(
        'cam',
        *network,
        images,
        '--target',
        2,
        '--max-channels',
        4,
        '--out',
        tmp_path / 'cam',
    )
    found = sorted(p.name for p in (tmp_path / 'cam').iterdir())
    assert found == [f'{n}.{t}' for n in ('0_a', '1_b', '2_c') for t in ('npz', 'png')]
    with np.load(tmp_path / 'cam' / '1_b.npz') as maps:
        assert list(maps) == [f'0/layer{i}.1' for i in range(1, 5)]
        assert maps['0/layer1.1'].shape == (32, 40)


@pytest.fixture
def transformer(tmp_path):
    """A vision transformer, plain and with layer attention."""
    arch = dict(embed_dims=12, num_layers=2, num_heads=3, feedforward_channels=16)
    found = []
    for name, kwargs in (
        ('vit', dict(type='VisionTransformer')),
        (
            'ela',
            dict(
                type='ELAVisionTransformer',
                layer_attention=dict(type='MRLALight', head_dim=4),
            ),
        ),
    ):
        cfg = classifier()
        cfg['model']['backbone'] = dict(kwargs, arch=arch, img_size=32, patch_size=8)
        cfg['model']['neck'] = None
        cfg['model']['head'] = dict(
            type='VisionTransformerClsHead', num_classes=4, in_channels=12
        )
        found.append(save(tmp_path, name, cfg))
    return found


def test_query_of_two_networks(transformer, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)  # is not needed
    plain, light = transformer
    out = tmp_path / 'cam'
    arguments = (*plain, images / 'b.jpg', '--compare', *light)
    tool('cam', *arguments, '--query', 0.6, 0.3, '--heads', 0, 2, '--out', out)
    numbers = json.loads((out / '0_b_query.json').read_text())
    assert [(n['network'], n['layer'], n['head']) for n in numbers] == [
        (f'{name} {name}.pth', 'layers.1', head)
        for name in ('vit', 'ela')
        for head in (0, 2)
    ]
    for row in numbers:
        weights = np.array(row['weights'])
        # The pipeline makes it 40 x 32 pixels
        assert weights.shape == (4, 5) and row['patch'] == [1, 3]
        assert weights.sum() + row['extra_tokens'] == pytest.approx(1)
    with Image.open(out / '0_b_query.png') as picture:
        assert picture.width > picture.height
    for extra, match in [
        (['--query', 2, 0], '2.0 0.0 is outside the image'),
        (['--query', 0, 0, '--heads', 3], '--heads 3: layers.1 has only heads 0 to 2'),
        (['--query', 0, 0, '--layers', 'layer1.1'], 'no layer layer1.1'),
    ]:
        with pytest.raises(SystemExit, match=match):
            tool('cam', *arguments, *extra, '--out', out)


def test_query_of_a_resnet(network, images, tmp_path):
    with pytest.raises(SystemExit, match='ELAResNet is not a vision transformer'):
        tool('cam', *network, images, '--query', 0, 0, '--out', tmp_path / 'cam')


def test_cam_errors_are_one_line(network, images, tmp_path):
    needs_grad_cam()
    for args, match in [
        (['--layers', 'layer7.0'], 'no block layer7.0'),
        (['--target', 4], 'target=4 is not a class'),
        (['--batch-size', 0], '--batch-size=0'),
        (['--compare', network[0], 'nowhere.pth'], 'there is no file nowhere.pth'),
    ]:
        with pytest.raises(SystemExit, match=match) as error:
            tool('cam', *network, images, '--out', tmp_path / 'cam', *args)
        assert '\n' not in error.value.code


def test_missing_grad_cam(network, images, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    monkeypatch.delitem(sys.modules, 'mmela.analysis.cam', raising=False)
    monkeypatch.delattr(mmela.analysis, 'cam', raising=False)
    with pytest.raises(SystemExit, match='pip install grad-cam') as error:
        tool('cam', *network, images)
    assert '\n' not in error.value.code


def test_errors_are_one_line(network, images, tmp_path):
    config, checkpoint = network
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad.jpg').write_text('no image')
    (tmp_path / 'bad.pth').write_text('no checkpoint')
    torch.save(dict(x=torch.zeros(1)), tmp_path / 'other.pth')
    wide = save(
        tmp_path,
        'wide',
        classifier(base_channels=16)
        | dict(
            model=dict(
                classifier(base_channels=16)['model'],
                head=dict(type='LinearClsHead', num_classes=4, in_channels=128),
            )
        ),
    )
    plain = classifier()
    plain['model']['backbone'] = dict(type='ResNet', depth=18, base_channels=8)
    plain['model']['head']['in_channels'] = 64
    plain = save(tmp_path, 'plain', plain)
    hook = dict(type='LayerAttentionPruningHook', policy=dict(type='EBQM', mu=7))
    bad_policy = tmp_path / 'bad_policy.py'
    Config(classifier() | dict(custom_hooks=[hook])).dump(bad_policy)
    data = ['--data', images]
    for args, match in [
        (('no.py', checkpoint, *data), 'there is no file no.py'),
        ((config, checkpoint), 'has no val_dataloader; .* --data'),
        ((config, tmp_path / 'bad.pth', *data), 'bad.pth is not a checkpoint'),
        ((config, tmp_path / 'other.pth', *data), 'keys are missing, such as'),
        ((config, wide[1], *data), 'does not fit .* size mismatch'),
        ((*plain, *data), 'has no layer attention'),
        ((*network, '--data', tmp_path / 'empty'), 'no image in .*empty'),
        ((*network, '--data', 'nowhere'), 'no image or folder nowhere'),
        ((*network, '--data', tmp_path / 'bad.jpg'), 'bad.jpg cannot be'),
        ((*network, *data, '--num-images', 0), '--num-images=0'),
        ((*network, '--data', images, '--device', 'abacus'), 'abacus'),
        ((bad_policy, checkpoint, *data), 'mu=7'),
    ]:
        with pytest.raises(SystemExit, match=match) as error:
            tool('layer_attention', *args)
        assert error.value.code.startswith('error: ')
        assert '\n' not in error.value.code, error.value.code


@pytest.mark.parametrize('name', ['layer_attention', 'cam'])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as error:
        tool(name, '--help')
    assert error.value.code == 0
    assert 'Example:' in capsys.readouterr().out


def test_images_of_paths(images):
    found = find_images([images, images / 'b.jpg'])
    assert [p.name for p in found] == ['a.PNG', 'b.jpg', 'c.bmp', 'b.jpg']
    assert evenly(10, 3) == [0, 3, 6] and evenly(2, 9) == [0, 1]


def test_report_shows_it(tmp_path):
    train(toy_config(tmp_path, epochs=1))
    result = dict(measurement(SMALL), format=1, images=3, data='images', left_out=['x'])
    for epoch in (10, 9):
        path = tmp_path / f'at/epoch_{epoch}/layer_attention.json'
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(dict(result, checkpoint=f'<b>epoch_{epoch}.pth')))
    page = Page(make_report(tmp_path))
    check_offline(page)
    text = ' '.join(page.text.split())
    first = text.index('Layer attention of <b>epoch_9')
    assert first < text.index('Layer attention of <b>epoch_10')
    assert 'b' not in page.tags and 'has no model.backbone' in text
    # Of each: two maps, KL, policy, features and queries; and the loss
    assert page.tags.count('img') == 2 * 6 + 1
    path.write_text('{"format": 1}')
    with pytest.raises(ValueError, match='epoch_9/layer_attention.json'):
        make_report(tmp_path)


def test_report_counts_the_backbone(tmp_path):
    run = tmp_path / 'run'
    train(toy_config(run, dict(windows=[(1, 1)]), epochs=2))
    (config,) = run.glob('*/vis_data/config.py')
    Config(classifier()).dump(config)
    names = [f'backbone.layer{s}.{b}.layer_attn' for s in range(1, 5) for b in range(2)]
    report = json.loads((run / 'pruning.json').read_text())
    for layer, name in zip(report['decisions'][0]['layers'], names):
        layer.update(name=name, pruned=name == names[1])
    (run / 'pruning.json').write_text(json.dumps(report))
    rows = [
        r
        for r in Page(make_report(run)).rows
        if r and r[0] in ('before pruning', 'after epoch 1')
    ]
    assert [r[1] for r in rows] == ['8', '7']
    # 8 heads of one channel: 9 + 2 per channel, and two kernels of 3
    counts = [int(r[3].split()[0].replace(',', '')) for r in rows]
    assert counts[0] - counts[1] == 11 * 8 + 2 * 3
    assert '%' in rows[1][2] and '%' in rows[1][3]
