"""tools/analysis/mmcv_operators.py against what detectors really call."""

import functools
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

from mmela.compat import mmcv_ext  # noqa: E402
from tests.helpers import detectors  # noqa: E402
from tests.helpers.operator_cases import provided_operators  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'analysis' / 'mmcv_operators.py'
CONFIGS = {
    'dpool.py': "_base_ = ['mmdet::dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py']",
    'carafe.py': "_base_ = ['mmdet::carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py']",
    'mask.py': "_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py']",
    'retina.py': "_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']",
    'soft.py': "_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']\n"
    "model = dict(test_cfg=dict(nms=dict(type='soft_nms')))",
    'nothing.py': 'data_root = None',
    'broken.py': "_base_ = ['nowhere.py']",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text, 'utf-8')
    return tmp_path


def test_operators_of_configs(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [TOOL.name, str(folder)])
    runpy.run_path(str(TOOL), run_name='__main__')
    out, err = capsys.readouterr()
    assert 'broken.py cannot be read: FileNotFoundError' in err
    assert '| `nms` | 4 | yes |' in out
    assert '| `softnms` | 1 | yes |' in out
    assert '| `deform_roi_pool_backward`, `deform_roi_pool_forward` | 1 | no |' in out
    assert '4 of 6 configs use only provided operators.' in out
    assert 'carafe.py: carafe_backward, carafe_forward' in out


def test_what_detectors_call_is_found(folder, monkeypatch):
    """All operators that run are among those found in the code."""
    called = set()

    def record(name, operator):
        @functools.wraps(operator)
        def recorder(*args, **kwargs):
            called.add(name)
            return operator(*args, **kwargs)

        return recorder

    for name, operator in list(vars(mmcv_ext).items()):
        if callable(operator) and not name.startswith('_'):
            monkeypatch.setattr(mmcv_ext, name, record(name, operator))
    found = runpy.run_path(str(TOOL))['operators_of_configs'](folder)
    for config, name in (('mask.py', 'mask_rcnn'), ('retina.py', 'retinanet')):
        called.clear()
        with provided_operators():
            detectors.run(name)
        assert 'nms' in called and called <= found[config]
