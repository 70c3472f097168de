"""docs/tutorial.md: every command on it, on tiny data, as it stands there."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer

from mmela.analysis.before_after_plots import read_before_after
from mmela.analysis.work_dir import Run
from tests.helpers.runs import decisions

pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'docs' / 'tutorial.md').read_text('utf-8')

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


def commands():
    """The commands in the page's bash blocks, split as a shell does."""
    found = []
    for block in re.findall('```bash\n(.*?)```', PAGE, re.S):
        lines = block.replace('\\\n', ' ').splitlines()
        found += [shlex.split(line, comments=True) for line in lines]
    return [command for command in found if command]


def config_of_the_page():
    """The diff on the page, applied."""
    (diff,) = re.findall('```diff\n(.*?)```', PAGE, re.S)
    return ''.join(
        line[1:] + '\n' for line in diff.splitlines() if not line.startswith('-')
    )


@pytest.fixture(scope='module')
def walk(tmp_path_factory):
    """Run the whole page in an empty folder."""
    cwd = tmp_path_factory.mktemp('tutorial')
    (cwd / 'narrow.py').write_text(NARROW)
    config, count = re.subn(
        '_base_ = .*', "_base_ = ['narrow.py']", config_of_the_page()
    )
    assert count == 1
    (cwd / 'my_config.py').write_text(config)
    patch = pytest.MonkeyPatch()
    patch.chdir(cwd)
    patch.setenv('CUDA_VISIBLE_DEVICES', '')
    try:
        for command in commands():
            run(command)
    finally:
        patch.undo()
    return cwd


def run(command):
    """Run ``python tools/...``, in this process to save its start."""
    assert command[0] == 'python' and command[1].startswith('tools/')
    script = ROOT / command[1]
    arguments = command[2:]
    if script.name == 'make_shapes.py':
        # The page's data set is 380 images of 192 pixels.
        arguments += ['--train', '4', '--val', '2', '--size', '64']
    # ONNX, which takes 20 s, has tests in test_convert.py.
    arguments = [x.replace('.onnx', '.pt') for x in arguments]
    # The runs are processes of their own on the page.
    MMLogger._instance_dict.clear()
    for cls in (Visualizer, *Visualizer.__subclasses__()):
        cls._instance_dict.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        runpy.run_path(str(script), run_name='__main__')


def test_every_tool_is_shown():
    """The steps that the page promises, in their order."""
    tools = [Path(command[1]).name for command in commands()]
    assert tools == [
        'make_shapes.py',
        'train.py',
        'layer_attention.py',
        'layer_attention.py',
        'report.py',
        'pictures.py',
        'test.py',
        'infer.py',
        'slim.py',
        'test.py',
        'export.py',
        'train.py',
    ]


def test_commands_in_the_text():
    """Files and tools that the page names are there."""
    for path in re.findall(r'\]\(([^)#]+)\)', PAGE):
        assert (ROOT / 'docs' / path).exists(), path
    for tool in re.findall(r'(tools/[\w/]+\.(?:py|sh))', PAGE):
        assert (ROOT / tool).is_file(), tool


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
    sides = result['sides']
    assert sides['before']['checkpoint'] == 'before_pruning.pth'
    assert (sides['before']['epoch'], sides['after']['epoch']) == (1, 12)
    assert sides['before']['active'] == sides['before']['attentions']
    logged = Run(work_dir).metrics[12]
    assert sides['after']['mean'] == pytest.approx(logged['coco/bbox_mAP'], abs=6e-4)
    mean = sides['after']['mean_50']
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
