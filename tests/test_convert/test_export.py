"""Export on the range of torch that is supported."""

import re

import pytest
import torch

from mmela import attach_layer_attention
from mmela.convert.export import check_export, export_backbone, export_network
from mmela.structure import layer_attentions, prune
from tests.helpers.attachable import Nested
from tests.helpers.zoo import AFTER_BLOCKS, stir


class Backbone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return x, x.mean((2, 3))


def test_onnx_of_an_older_torch(tmp_path, monkeypatch):
    """Which knows neither `dynamo` nor `dynamic_shapes`."""
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    export = torch.onnx.export

    def export_as_before(model, args, f, input_names, output_names, **kwargs):
        assert set(kwargs) == {'opset_version', 'dynamic_axes'}
        options = dict(dynamo=False) if torch.__version__ >= '2.6' else {}
        kwargs.update(input_names=input_names, output_names=output_names, **options)
        return export(model, args, f, **kwargs)

    monkeypatch.setattr(torch.onnx, 'export', export_as_before)
    monkeypatch.setattr('mmela.convert.export._FIRST_WITH_DYNAMO', '99.0')
    backbone = Backbone()
    path = tmp_path / 'x.onnx'
    export_backbone(backbone, path, (32, 32))
    session = onnxruntime.InferenceSession(str(path))
    for shape in [(2, 3, 32, 32), (1, 3, 40, 34)]:
        x = torch.rand(shape)
        for found, expected in zip(session.run(None, dict(x=x.numpy())), backbone(x)):
            torch.testing.assert_close(torch.as_tensor(found), expected)


@pytest.mark.parametrize('attention', ['MRLABase', 'AttnRes', 'AttnRes-groups'])
def test_onnx_of_an_attached_network(tmp_path, attention):
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    config = AFTER_BLOCKS[attention]
    backbone = attach_layer_attention(Nested(), config, input_size=(32, 48)).eval()
    for seed, module in enumerate(layer_attentions(backbone).values()):
        stir(module, seed)
    names = list(layer_attentions(backbone))
    prune(backbone, names[1:2])
    path = tmp_path / 'x.onnx'
    export_backbone(backbone, path, (32, 48))
    session = onnxruntime.InferenceSession(str(path))
    x = torch.rand(3, 3, 40, 36)
    found = session.run(None, dict(x=x.numpy()))
    torch.testing.assert_close(torch.as_tensor(found[0]), backbone(x))


@pytest.mark.skipif(not hasattr(torch.onnx, 'ONNXProgram'), reason='an older torch')
@pytest.mark.parametrize('missing', [['onnx'], ['onnxscript'], ['onnx', 'onnxscript']])
def test_packages_are_checked_first(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(
        'mmela.convert.export.find_spec', lambda name: name not in missing or None
    )
    names = ' and '.join(missing)
    for export in (export_backbone, export_network):
        with pytest.raises(ImportError, match=rf'{names}: .*mmela\[export\]'):
            export(None, tmp_path / 'x.onnx')
    check_export('x.pt2')  # which need none of them
    check_export('x.pt', backbone=True)


@pytest.mark.parametrize('progress', [False, True])
def test_progress(tmp_path, capsys, progress):
    path = tmp_path / 'x.pt'
    export_backbone(Backbone(), path, (32, 32), progress=progress)
    assert path.is_file()
    expected = rf'Writing {path} \.\.\. \d+ s\n' if progress else ''
    assert re.fullmatch(expected, capsys.readouterr().out)


def test_other_file_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'must end with .onnx .* or .pt'):
        export_backbone(Backbone(), tmp_path / 'x.pth')
