"""mmdet's own tools, and ours, in processes of their own."""

import json
import sys
from pathlib import Path

import pytest
import torch

import mmela  # noqa: F401  (its own checkpoints must load)
from tests.helpers.fresh import check as run
from tests.helpers.runs import decisions

mmdet = pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[1]
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim' / 'tools'
CONFIG = ROOT / 'configs/faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py'


def options(shapes):
    """The 1x COCO config made small: its structure stays."""
    anns = shapes / 'annotations'
    return [
        '--cfg-options',
        f'train_dataloader.dataset.data_root={shapes}/',
        f'val_dataloader.dataset.data_root={shapes}/',
        f'test_dataloader.dataset.data_root={shapes}/',
        f'val_evaluator.ann_file={anns}/instances_val2017.json',
        f'test_evaluator.ann_file={anns}/instances_val2017.json',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'val_dataloader.num_workers=0',
        'val_dataloader.persistent_workers=False',
        'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
        'model.backbone.init_cfg=None',
        'model.backbone.base_channels=8',
        'model.backbone.layer_attention.head_dim=8',
        'model.neck.in_channels=[32,64,128,256]',
        'model.neck.out_channels=16',
        'model.rpn_head.in_channels=16',
        'model.rpn_head.feat_channels=16',
        'model.roi_head.bbox_roi_extractor.out_channels=16',
        'model.roi_head.bbox_head.in_channels=16',
        'model.roi_head.bbox_head.fc_out_channels=32',
        'model.train_cfg.rpn_proposal.max_per_img=50',
        'model.test_cfg.rpn.max_per_img=50',
        # Detections of a hardly trained network, so that there are some
        'model.test_cfg.rcnn.score_thr=0.',
        'train_cfg.max_epochs=3',
        'custom_hooks.0.windows=[(1,1),(3,3)]',
        'default_hooks.logger.interval=1',
        # mmdet's pipelines resize to 1333 x 800
        'train_dataloader.dataset.pipeline.2.scale=(96,96)',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)',
        'test_dataloader.dataset.pipeline.1.scale=(96,96)',
    ]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, shapes):
    """A run by mmdet's train.py, from a folder outside the checkout."""
    cwd = tmp_path_factory.mktemp('run')
    out = run(
        MMDET_TOOLS / 'train.py',
        CONFIG,
        '--work-dir',
        cwd / 'work',
        *options(shapes),
        f'val_evaluator.outfile_prefix={cwd}/val',
        cwd=cwd,
    )
    return cwd, out


def active(path):
    state = torch.load(path)['state_dict']
    return {
        key: int(value)
        for key, value in state.items()
        if key.endswith('layer_attn.state')
    }


def test_train_prunes(trained):
    cwd, out = trained
    found = decisions(cwd / 'work')
    assert [d.window for d in found] == [(1, 1), (3, 3)]
    pruned = {f'{name}.state' for d in found for name in d.pruned}
    assert pruned, 'nothing was pruned'
    states = active(cwd / 'work' / 'epoch_3.pth')
    assert len(states) == 13  # none in the frozen stage
    assert {key for key, state in states.items() if state} == pruned
    assert 'bbox_mAP' in out


def test_resume(trained, tmp_path, shapes):
    """With torch's safe loading, through mmdet's own tool."""
    cwd, _ = trained
    run(
        MMDET_TOOLS / 'train.py',
        CONFIG,
        '--work-dir',
        tmp_path,
        '--resume',
        cwd / 'work' / 'epoch_2.pth',
        *options(shapes),
        cwd=tmp_path,
    )
    assert active(tmp_path / 'epoch_3.pth') == active(cwd / 'work' / 'epoch_3.pth')


@pytest.mark.parametrize(
    'script',
    [
        pytest.param(
            MMDET_TOOLS / 'test.py',
            id='mmdet',
            marks=pytest.mark.skipif(
                sys.modules['mmcv._ext'].__file__.endswith('mmcv_ext.py'),
                reason='mmdet asks for operators before it reads the config',
            ),
        ),
        pytest.param(ROOT / 'tools' / 'test.py', id='mmela'),
    ],
)
def test_test(trained, tmp_path, shapes, script):
    """The detections are those of the last validation in training."""
    cwd, _ = trained
    out = run(
        script,
        CONFIG,
        cwd / 'work' / 'epoch_3.pth',
        '--work-dir',
        tmp_path,
        *options(shapes),
        f'test_evaluator.outfile_prefix={tmp_path}/test',
        cwd=tmp_path,
    )
    assert 'bbox_mAP' in out
    found = json.loads((tmp_path / 'test.bbox.json').read_text())
    expected = json.loads((cwd / 'val.bbox.json').read_text())
    assert expected
    assert found == expected


def test_our_train(tmp_path, shapes):
    run(
        ROOT / 'tools' / 'train.py',
        CONFIG,
        '--work-dir',
        tmp_path,
        *options(shapes),
        'train_cfg.max_epochs=1',
        'custom_hooks.0.windows=[(1,1)]',
        cwd=tmp_path,
    )
    assert (tmp_path / 'epoch_1.pth').exists()
