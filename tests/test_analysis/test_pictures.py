"""mmela pictures and what tools/demo.py measures."""

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from mmela.analysis.work_dir import Run
from mmela.tools import pictures
from mmela.visualization import decision_plots
from tests.helpers.measurements import stage, write_measurement
from tests.helpers.work_dirs import make_work_dir, write_log

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
ACTIVE = ['active'] * 4


def test_pictures(tmp_path, capsys):
    make_work_dir(tmp_path)
    write_measurement(tmp_path, 2, {'backbone.layer1': stage(ACTIVE)})
    write_measurement(
        tmp_path, 4, {'backbone.layer1': stage(ACTIVE[:2] + ['pruned', 'active'])}
    )
    out = tmp_path / 'new' / 'pictures'
    pictures.main([str(tmp_path), str(out)])
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(map(str, out.iterdir()))
    assert {p.name for p in out.iterdir()} == {
        f'{name}{theme}.png'
        for name in ('kl', 'attention_maps')
        for theme in ('', '_dark')
    }
    for path in out.iterdir():
        assert path.stat().st_size < 150_000
        with Image.open(path) as image:
            corner = image.convert('L').getpixel((0, 0))
            # Opaque, so it can be read on any page
            assert (corner < 64) == path.stem.endswith('_dark')
            assert image.convert('L').getextrema()[1] > 200


def test_pruning_that_removed_most(tmp_path, monkeypatch):
    first, second = make_work_dir(tmp_path)
    seen = []
    monkeypatch.setattr(decision_plots, 'kl_plot', seen.append)
    pictures.divergences(tmp_path)
    assert seen == [max((first, second), key=lambda d: len(d.pruned))]


def test_changed_stage():
    pruned = ['active', 'pruned', 'active', 'active']
    before = dict(a=stage(ACTIVE), b=stage(ACTIVE), c=stage(pruned))
    after = dict(a=stage(ACTIVE), b=stage(pruned), c=stage(pruned))
    assert pictures.changed_stage(before, after) == 'b'
    # Nothing lost: the deepest
    before['d'] = stage(ACTIVE * 2)
    assert pictures.changed_stage(before, before) == 'd'
    with pytest.raises(ValueError, match='no stage'):
        pictures.changed_stage(before, dict(a=stage(ACTIVE, maps=None)))


def test_errors(tmp_path):
    out = tmp_path / 'out'

    def error():
        with pytest.raises(SystemExit) as caught:
            pictures.main([str(tmp_path), str(out)])
        assert '\n' not in caught.value.code and not out.exists()
        return caught.value.code

    make_work_dir(tmp_path)
    assert 'has 0 layer_attention.json, but two are needed' in error()
    report = json.loads((tmp_path / 'pruning.json').read_text())
    for layer in [x for d in report['decisions'] for x in d['layers']]:
        layer['pruned'] = False
    (tmp_path / 'pruning.json').write_text(json.dumps(report))
    assert 'has no decision that pruned anything' in error()


# -- tools/demo.py ---------------------------------------------------------


@pytest.fixture(scope='module')
def demo():
    pytest.importorskip('mmdet')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return runpy.run_path(str(TOOLS / 'demo.py'))


def measured(demo, work_dir):
    return [p.name for p in demo['checkpoints_to_measure'](Run(work_dir))]


def test_checkpoints_of_the_demo(demo, tmp_path):
    make_work_dir(tmp_path)  # pruned after 1 and 3
    assert measured(demo, tmp_path) == ['epoch_4.pth']
    for name in ('epoch_1', 'epoch_2', 'epoch_3', 'epoch_x', 'iter_2'):
        (tmp_path / f'{name}.pth').touch()
    # That of epoch 3 is written after the pruning.
    assert measured(demo, tmp_path) == ['epoch_2.pth', 'epoch_4.pth']


def test_checkpoints_without_pruning(demo, tmp_path):
    write_log(tmp_path, '20260102_030405', [1, 2])
    assert measured(demo, tmp_path) == []
    for epoch in (1, 2):
        (tmp_path / f'epoch_{epoch}.pth').touch()
    (tmp_path / 'last_checkpoint').write_text('epoch_2.pth')
    assert measured(demo, tmp_path) == ['epoch_2.pth']


def test_demo_keeps_the_checkpoint_before(config_dir):
    """Its config keeps one from before the last pruning."""
    pytest.importorskip('mmdet')
    from mmengine.config import Config

    cfg = Config.fromfile(
        config_dir / 'demo' / 'faster-rcnn_r50-narrow_ela_fpn_shapes.py'
    )
    hook = cfg.default_hooks.checkpoint
    assert hook.interval == 1
    oldest = cfg.train_cfg.max_epochs - hook.max_keep_ckpts + 1
    assert oldest < cfg.custom_hooks[0].windows[-1][0]
