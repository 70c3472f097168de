from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import Runner
from torch import nn

from mmela.hooks import MemoryFormatHook, use_channels_last
from tests.helpers.backbones import build
from tests.helpers.toy import toy_config


def runner(**parts):
    return SimpleNamespace(model=nn.ModuleDict(parts))


def test_channels_last_within_and_contiguous_maps_without():
    backbone = build('mmdet', 'ResNet', dict(type='MRLABase'))
    backbone.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(x)
        run, hook = runner(backbone=backbone), MemoryFormatHook()
        hook.before_train(run)
        hook.before_val(run)  # within the training: once is enough
        seen = []
        backbone.layer1.register_forward_hook(lambda m, args, out: seen.append(out))
        outs = backbone(x)
    assert len(backbone._forward_hooks) == 1
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()
    for out, e in zip(outs, expected):
        assert out.is_contiguous()
        torch.testing.assert_close(out, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('when', ['before_val', 'before_test'])
def test_a_part_by_name_without_training(when):
    run = runner(neck=nn.ModuleDict(dict(a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3))))
    getattr(MemoryFormatHook('neck.b'), when)(run)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    a, b = run.model.neck.a, run.model.neck.b
    assert not a(x).is_contiguous()
    assert b(x).is_contiguous()
    assert b.weight.is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_part_is_named_with_what_there_is():
    hook = MemoryFormatHook('backbon')
    with pytest.raises(
        ValueError, match="ModuleDict has no module 'backbon'.*'backbone'"
    ):
        hook.before_train(runner(backbone=nn.Identity()))


def test_operators_of_mmcv_get_contiguous_maps():
    """Compiled RoIAlign would misread others, without a word."""
    ops = pytest.importorskip('mmcv.ops', exc_type=ImportError)
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(conv=nn.Conv2d(3, 8, 3), roi=ops.RoIAlign(2)))
    rois = torch.tensor([[0.0, 1, 1, 9, 7], [1.0, 0, 2, 5, 9]])
    x = torch.randn(2, 3, 12, 12)

    def run():
        return model.roi(model.conv(x), rois)

    expected = run()
    for _ in range(2):
        use_channels_last(model)
    assert not model.conv(x).is_contiguous()
    assert len(model.roi._forward_pre_hooks) == 1
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)


def test_one_setting_beside_the_hooks_of_a_config(tmp_path):
    """What --channels-last sets: the config's own hooks remain."""
    cfg = toy_config(tmp_path, dict(windows=[(1, 1)]))
    cfg.merge_from_dict(
        {
            'default_hooks.memory_format.type': 'MemoryFormatHook',
            'default_hooks.memory_format.module': 'layer1',
        }
    )
    hooks = [type(hook).__name__ for hook in Runner.from_cfg(cfg).hooks]
    assert {'MemoryFormatHook', 'LayerAttentionPruningHook', 'LoggerHook'} <= set(hooks)
