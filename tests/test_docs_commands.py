"""Every command and code block of the pages, on tiny data, as it stands there.

docs/step_by_step.md is walked first, from its config to the fine-tuned network; all
other pages run where it has left its files. A block that is not run says why, in a
comment before it; those that only take long are run with MMELA_LONG=1.
"""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import (
    HOOKS,
    MODELS,
    VISBACKENDS,
    DefaultScope,
    init_default_scope,
)
from mmengine.visualization import Visualizer

from mmela.analysis.before_after_plots import read_before_after
from mmela.analysis.work_dir import Run
from mmela_light.command import TOOLS, main
from tests.helpers.documents import (
    PAGES,
    REASONS,
    ROOT,
    applied,
    blocks,
    commands,
    is_config,
)
from tests.helpers.published_networks import PublishedNetwork
from tests.helpers.runs import decisions

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

WALK = ROOT / 'docs' / 'step_by_step.md'
BLOCKS = [block for page in PAGES for block in blocks(page)]
HERE = [
    page for page in PAGES if page != WALK and any(not b.mark for b in blocks(page))
]
LONG = [block for block in BLOCKS if block.mark == 'not run: long']

# What the page's config stands on in the test, in place of its own base: the
# same Faster R-CNN, narrower and with fewer blocks, from scratch, for images
# of 64 pixels.
NARROW = """
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']
model = dict(
    backbone=dict(
        depth=18, base_channels=32, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=16)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=16)),
        rpn_proposal=dict(nms_pre=20, max_per_img=20),
        rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(
        rpn=dict(nms_pre=20, max_per_img=20),
        rcnn=dict(score_thr=0., max_per_img=5)))
param_scheduler = []
"""
NARROW += ''.join(
    f"""
{split}_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root='data/shapes/',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(64, 64), keep_ratio=True),
            dict(
                type='PackDetInputs',
                meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                           'scale_factor'))
        ]))
"""
    for split in ('train', 'val', 'test')
)
NARROW += """
train_dataloader['dataset']['filter_cfg'] = dict(filter_empty_gt=False)
val_evaluator = dict(ann_file='data/shapes/annotations/instances_val2017.json')
test_evaluator = val_evaluator
train_cfg = dict(val_interval=12)
"""


# Where an option or a number stands for the size of the work, or a name for a block
# that the narrow network has not
SMALLER = {
    'tools/analysis/cam.py': ['--max-channels', '2', '--score-thr', '0'],
    'tools/dataset/make_shapes.py': ['--train', '4', '--val', '2', '--size', '64'],
    'shapes': ['--train', '4', '--val', '2', '--size', '64'],  # mmela shapes
}
OTHER_NAMES = {'layer3.4': 'layer3.0', 'layer3.5': 'layer3.1', '20': '4'}


@pytest.fixture(scope='module')
def walk(tmp_path_factory):
    """Walk docs/step_by_step.md in an empty folder."""
    cwd = tmp_path_factory.mktemp('walk')
    (cwd / 'narrow.py').write_text(NARROW)
    page = blocks(WALK)
    (diff,) = [block for block in page if block.language == 'diff']
    config, count = re.subn('_base_ = .*', "_base_ = ['narrow.py']", applied(diff.text))
    assert count == 1
    (cwd / 'my_config.py').write_text(config)
    with in_folder(cwd):
        for block in page:
            if block.language == 'bash' and not block.mark:
                for command in commands(block):
                    run(command)
        image = cv2.imread(str(sorted((cwd / 'data').rglob('*.png'))[0]))
        for name in ('cat.jpg', 'dog.jpg', 'street.jpg', 'photos/a.jpg', 'more/b.png'):
            os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
            cv2.imwrite(name, image)
        video = cv2.VideoWriter(
            'clip.mp4', cv2.VideoWriter_fourcc(*'mp4v'), 5, (64, 64)
        )
        video.write(image)
        video.release()
        network = PublishedNetwork('mrla_light', (3, 4, 6, 3), '7x7', 32)
        torch.save(network.state_dict, 'model_best.pth.tar')
    return cwd


@contextlib.contextmanager
def in_folder(cwd):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setenv('CUDA_VISIBLE_DEVICES', '')
        if not (cwd / 'tools').exists():
            (cwd / 'tools').symlink_to(ROOT / 'tools')
            (cwd / 'configs').symlink_to(ROOT / 'configs')
        yield


DONE = set()


def run(command):
    """Run a command in this process, to save its start; each only once."""
    same = tuple(command)
    if command[0] == 'mmela' and command[1] in TOOLS:
        same = ('python', TOOLS[command[1]], *command[2:])
    if same in DONE:
        return
    DONE.add(same)
    # They are processes of their own on the page.
    MMLogger._instance_dict.clear()
    DefaultScope._instance_dict.clear()
    for cls in (Visualizer, *Visualizer.__subclasses__()):
        cls._instance_dict.clear()
    # ONNX, which takes 20 s, has tests in test_convert.
    command = [OTHER_NAMES.get(x, x).replace('.onnx', '.pt') for x in command]
    program, *arguments = command
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'path', list(sys.path))
        try:
            if program == 'mmela':
                patch.setattr(sys, 'argv', command)
                main(arguments + SMALLER.get(arguments[0], []), standalone_mode=False)
            elif arguments[0] == '-c':
                exec(arguments[1], {'__name__': '__main__'})
            elif arguments[0] == '-m':
                patch.setattr(sys, 'argv', arguments[1:])
                runpy.run_module(arguments[1], run_name='__main__')
            else:
                script = ROOT / arguments[0]
                arguments = arguments[1:] + SMALLER.get(arguments[0], [])
                patch.setattr(sys, 'argv', [str(script), *arguments])
                patch.syspath_prepend(str(script.parent))
                runpy.run_path(str(script), run_name='__main__')
        except SystemExit as end:
            assert not end.code, end.code


def run_config(code, cwd):
    """Read a config, and build of it what mmela has to do with."""
    # Paths in configs/README.md are those of a folder of configs.
    code = code.replace("'../_base_", f"'{ROOT}/configs/_base_")
    code = code.replace("'./", f"'{ROOT}/configs/faster_rcnn/")
    path = cwd / 'block.py'
    path.write_text(code)
    cfg = Config.fromfile(path)
    DefaultScope._instance_dict.clear()
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    backbone = cfg.get('model', {}).get('backbone')
    if backbone and backbone.get('type', '').startswith('ELA') and '_base_' not in code:
        base = "_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']\n"
        path.write_text(base + code)
        backbone = Config.fromfile(path).model.backbone
    if backbone:
        if 'backbone' in backbone:  # attached
            backbone.backbone.init_cfg = None
        else:
            backbone.init_cfg = None
        MODELS.build(backbone)
    for hook in cfg.get('custom_hooks', []):
        HOOKS.build(hook)
    for backend in cfg.get('visualizer', {}).get('vis_backends', []):
        VISBACKENDS.build(dict(backend, save_dir=str(cwd / 'vis')))


@pytest.mark.parametrize('page', HERE, ids=lambda page: page.stem)
def test_page(page, walk, capsys):
    """All blocks of a page, in their order; those of Python share their names."""
    names = {'__name__': '__main__'}
    with in_folder(walk):
        for block in blocks(page):
            if block.mark:
                continue
            try:
                if block.language == 'bash':
                    for command in commands(block):
                        run(command)
                elif block.language == 'yaml':
                    assert isinstance(yaml.safe_load(block.text), (dict, list))
                elif block.language == 'diff' or is_config(block.text):
                    is_diff = block.language == 'diff'
                    run_config(applied(block.text) if is_diff else block.text, walk)
                else:
                    # In a file, as dataclasses and hooks look for their source
                    code = compile(block.text, block.where, 'exec')
                    with contextlib.redirect_stdout(io.StringIO()):
                        exec(code, names)
            except BaseException as error:
                raise AssertionError(f'{block.where}: {error!r}') from error


@pytest.mark.skipif(not os.environ.get('MMELA_LONG'), reason='long: MMELA_LONG=1')
@pytest.mark.parametrize('block', LONG, ids=lambda block: block.where)
def test_long(block):
    """Commands that take minutes to hours, in this checkout."""
    subprocess.run(['bash', '-ec', block.text], cwd=ROOT, check=True)


def test_marks():
    """A block that is not run says why, or where else it is run."""
    for block in BLOCKS:
        kind, _, what = block.mark.partition(' run: ')
        if block.mark.startswith('run in '):
            test = ROOT / block.mark[len('run in ') :]
            assert test.is_file(), f'{block.where}: no {test}'
        elif block.mark:
            assert kind == 'not' and what in REASONS, f'{block.where}: {block.mark}'


def test_every_tool_is_shown():
    """The steps that the page promises, in their order."""
    steps = [b for b in blocks(WALK) if b.mark != 'not run: installs']
    found = [c for b in steps if b.language == 'bash' for c in commands(b)]
    assert all(command[0] == 'mmela' for command in found)
    tools = [command[1] for command in found]
    assert tools == [
        'shapes',
        'train',
        'layer-attention',
        'layer-attention',
        'report',
        'pictures',
        'test',
        'infer',
        'slim',
        'test',
        'export',
        'export',
        'train',
    ]


def test_lines_for_the_shapes(tmp_path):
    """In a config of mmdet they reach all data sets and the evaluators."""
    (lines,) = [b for b in blocks(WALK) if b.language == 'python']
    base = "_base_ = ['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py']\n"
    (tmp_path / 'shapes.py').write_text(base + lines.text)
    cfg = Config.fromfile(tmp_path / 'shapes.py')
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == 'data/shapes/'
        assert [x.scale for x in dataset.pipeline if x.type == 'Resize'] == [(192, 192)]
    assert cfg.test_evaluator.ann_file.startswith('data/shapes/')


def test_trained_and_pruned(walk):
    work_dir = walk / 'work_dirs' / 'my_config'
    assert [d.window for d in decisions(work_dir)] == [(1, 1), (7, 7)]
    pruned = {name for d in decisions(work_dir) for name in d.pruned}
    assert pruned
    state = torch.load(work_dir / 'epoch_12.pth')['state_dict']
    assert {
        k[: -len('.state')]
        for k, v in state.items()
        if k.endswith('layer_attn.state') and v
    } == pruned


def test_report_and_pictures(walk):
    work_dir = walk / 'work_dirs' / 'my_config'
    page = (work_dir / 'report.html').read_text('utf-8')
    assert 'Attention maps, before and after' in page
    for epoch in (6, 12):
        assert f'Layer attention of epoch_{epoch}' in page
        assert (work_dir / f'layer_attention/epoch_{epoch}/kl.png').is_file()
    assert {p.name for p in (walk / 'pictures').iterdir()} == {
        'kl.png',
        'kl_dark.png',
        'attention_maps.png',
        'attention_maps_dark.png',
        'before_after.jpg',
    }


def test_before_and_after(walk):
    """The network before the first pruning; the last one has its logged AP."""
    work_dir = walk / 'work_dirs' / 'my_config'
    result = read_before_after(work_dir)
    written = (work_dir / 'before_after' / 'before_after.json').read_text()
    assert json.loads(json.dumps(result)) == json.loads(written)
    sides = result['sides']
    assert sides['before']['checkpoint'] == 'before_pruning.pth'
    assert (sides['before']['epoch'], sides['after']['epoch']) == (1, 12)
    assert sides['before']['active'] == sides['before']['attentions']
    logged = Run(work_dir).metrics[12]
    assert sides['after']['mean'] == pytest.approx(logged['coco/bbox_mAP'], abs=6e-4)
    mean = np.mean(sides['after']['curves']['0.50'])
    assert mean == pytest.approx(logged['coco/bbox_mAP_50'], abs=6e-4)
    page = (work_dir / 'report.html').read_text('utf-8')
    assert 'Detections, before and after' in page
    assert len(page) < 3_000_000


def test_predictions(walk):
    content = json.loads((walk / 'found' / 'predictions.json').read_text())
    assert len(content['images']) == 2
    assert len(list((walk / 'found').glob('*.png'))) == 2


def test_slim_exported_and_tuned(walk):
    full = torch.load(walk / 'work_dirs/my_config/epoch_12.pth')['state_dict']
    slim = torch.load(walk / 'slim.pth')['state_dict']
    assert 0 < len(slim) < len(full)
    assert (walk / 'backbone.pt').stat().st_size > 1000
    hooks = Config.fromfile(walk / 'slim.py').custom_hooks
    assert not hooks
    tuned = torch.load(walk / 'work_dirs/finetuned/epoch_2.pth')['state_dict']
    assert set(tuned) == set(slim)
    # Started from the slim network, and trained
    key = 'roi_head.bbox_head.fc_cls.weight'
    change = (tuned[key] - slim[key]).norm() / slim[key].norm()
    assert 0 < change < 0.5


def test_slim_network_has_the_same_metrics(walk):
    """Both tests of the page, by what they logged."""
    metrics = []
    for folder in ('my_config', 'slim'):
        (path,) = [
            p
            for p in (walk / 'work_dirs' / folder).glob('*/*.json')
            if re.fullmatch(r'\d+_\d+', p.stem)
        ]
        metrics.append(
            {k: v for k, v in json.loads(path.read_text()).items() if 'bbox' in k}
        )
    assert metrics[0] and metrics[0] == metrics[1]
