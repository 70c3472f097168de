"""What tools/demo.py adds to a training; the training itself is test_end_to_end's."""

import runpy
from pathlib import Path

import torch

from tests.helpers.backbones import ATTENTIONS, build

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


def test_channels_last_within_and_contiguous_maps_without(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    use_channels_last = runpy.run_path(str(TOOLS / 'demo.py'))['use_channels_last']
    backbone = build('mmdet', 'ELAResNet', ATTENTIONS['MRLABase'])
    backbone.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(x)
        use_channels_last(backbone)
        seen = []
        backbone.layer1.register_forward_hook(lambda m, args, out: seen.append(out))
        outs = backbone(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()
    for out, e in zip(outs, expected):
        assert out.is_contiguous()
        torch.testing.assert_close(out, e, rtol=1e-4, atol=1e-4)
