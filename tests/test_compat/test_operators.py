"""Operators for mmcv: against compiled ones, against hand-worked numbers, and
in processes that have no compiled mmcv."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmela.compat import mmcv_ext
from mmela.compat.operators import remove_operators, write_operators
from mmela_light.operators import provide_operators
from tests.helpers.operator_cases import OPERATORS, difference, provided_operators

mmcv_ops = pytest.importorskip('mmcv.ops', exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
COMPILED = 'torchvision' not in mmcv_ops.get_compiler_version()
needs_compiled = pytest.mark.skipif(not COMPILED, reason='mmcv is not compiled')
needs_mmdet = pytest.mark.skipif(
    find_spec('mmdet') is None, reason='mmdet is not installed'
)
# Relative to the largest value of an output or gradient
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}


@pytest.fixture
def provided():
    """mmcv.ops uses the operators under test, whatever mmcv has."""
    with provided_operators():
        yield


@needs_compiled
@pytest.mark.parametrize('name', OPERATORS)
def test_equals_compiled(name):
    exact = name in ('nms', 'nms_match', 'roi_align')
    for seed in range(1000, 1030):
        gap, dtype = difference(name, seed)
        assert gap <= (0 if exact else TOLERANCE[dtype]), seed


# --- numbers worked out by hand ----------------------------------------------


def test_nms(provided):
    # IoU of 0 and 1: 60 / 100; of 0 and 2: none
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.4, 0.9])
    assert mmcv_ops.nms(boxes, scores, 0.6)[1].tolist() == [2, 0, 1]
    assert mmcv_ops.nms(boxes, scores, 0.59)[1].tolist() == [2, 0]
    # One pixel wider, the IoU is 77 / 121 = 0.636.
    assert mmcv_ops.nms(boxes, scores, 0.6, offset=1)[1].tolist() == [2, 0]
    assert mmcv_ops.nms(boxes, scores, 0.6, max_num=1)[1].tolist() == [2]
    dets, kept = mmcv_ops.nms(boxes[:0], scores[:0], 0.6)
    assert dets.shape == (0, 5) and kept.shape == (0,)


@pytest.mark.parametrize(
    'method, score',
    [('naive', None), ('linear', 0.4), ('gaussian', 0.8 * math.exp(-0.5))],
)
def test_soft_nms(provided, method, score):
    # IoU of 0 and 1: 50 / 100
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.8, 0.9, 0.3])
    dets, kept = mmcv_ops.soft_nms(boxes, scores, 0.5, sigma=0.5, method=method)
    expected = (
        [(1, 0.9), (2, 0.3)] if score is None else [(1, 0.9), (0, score), (2, 0.3)]
    )
    assert kept.tolist() == [index for index, _ in expected]
    assert_close(dets[:, 4], torch.tensor([value for _, value in expected]))
    assert_close(dets[:, :4], boxes[kept])


def test_soft_nms_drops_low_scores(provided):
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.8, 0.9, 0.3])
    _, kept = mmcv_ops.soft_nms(boxes, scores, 0.5, method='linear', min_score=0.35)
    assert kept.tolist() == [1, 0]
    dets, kept = mmcv_ops.soft_nms(boxes[:0], scores[:0], 0.5)
    assert dets.shape == (0, 5) and kept.shape == (0,)


def test_soft_nms_of_boxes_without_area(provided):
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5]])
    scores = torch.tensor([0.5, 0.4])
    dets, _ = mmcv_ops.soft_nms(boxes, scores, 0.5, method='gaussian')
    assert dets[:, 4].tolist() == scores.tolist()


def test_nms_match(provided):
    dets = torch.tensor(
        [[0, 0, 10, 5, 0.8], [0, 0, 10, 10, 0.9], [20, 20, 30, 30, 0.3]]
    )
    groups = mmcv_ops.nms_match(dets, 0.5)
    assert [group.tolist() for group in groups] == [[1, 0], [2]]
    assert [group.tolist() for group in mmcv_ops.nms_match(dets, 0.51)] == [
        [1],
        [0],
        [2],
    ]


def ramp(dtype=torch.float32):
    """Features whose value is 10 * row + column, and a box from 1 to 5."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing='ij')
    features = (10.0 * rows + columns).to(dtype)[None, None].requires_grad_()
    return features, torch.tensor([[0, 1, 1, 5, 5]], dtype=dtype)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_roi_align_of_a_ramp(provided, dtype):
    features, rois = ramp(dtype)
    # Centres of the bins: 2 and 4 pixels, less a half where aligned
    output = mmcv_ops.roi_align(features, rois, 2, 1.0, 2, 'avg', True)
    assert output.flatten().tolist() == [16.5, 18.5, 36.5, 38.5]
    output = mmcv_ops.roi_align(features, rois, 2, 1.0, 0, 'avg', False)
    assert output.flatten().tolist() == [22, 24, 42, 44]
    output.sum().backward()
    assert features.grad.sum() == 4 and features.grad.dtype == dtype


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_maximum_roi_align_of_a_ramp(provided, dtype):
    features, rois = ramp(dtype)
    # Samples 1.5, 2.5 and 3.5, 4.5 pixels; half a pixel less where aligned
    output = mmcv_ops.roi_align(features, rois, 2, 1.0, 2, 'max', True)
    assert output.flatten().tolist() == [22, 24, 42, 44]
    output.backward(torch.tensor([[[[1, 2], [3, 4]]]], dtype=dtype))
    expected = torch.zeros(8, 8, dtype=dtype)
    expected[2, 2], expected[2, 4], expected[4, 2], expected[4, 4] = 1, 2, 3, 4
    assert torch.equal(features.grad[0, 0], expected)


def test_maximum_roi_align_needs_a_sampling_ratio(provided):
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        mmcv_ops.roi_align(*ramp(), 2, 1.0, 0, 'max', True)


def test_roi_align_of_no_boxes(provided):
    features, rois = ramp()
    output = mmcv_ops.roi_align(features, rois[:0], 7)
    output.sum().backward()
    assert output.shape == (0, 1, 7, 7) and not features.grad.any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_sigmoid_focal_loss_at_zero(provided, dtype):
    logits = torch.zeros(2, 2, dtype=dtype, requires_grad=True)
    target = torch.tensor([1, 2])  # of two classes: the second, background
    loss = mmcv_ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    # Of probability 1/2: (1 - alpha) / 4 * log 2, alpha / 4 * log 2
    no, yes = 0.1875 * math.log(2), 0.0625 * math.log(2)
    expected = torch.tensor([[no, yes], [no, no]])
    assert_close(loss.float(), expected, rtol=1e-3, atol=1e-4)
    loss.sum().backward()
    slope = 0.25 * (0.5 + math.log(2))  # without alpha
    expected = torch.tensor([[0.75, -0.25], [0.75, 0.75]]) * slope
    assert_close(logits.grad.float(), expected, rtol=1e-3, atol=1e-4)


def test_sigmoid_focal_loss_weighs_classes(provided):
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    weight = torch.tensor([1.0, 2, 3])
    plain = mmcv_ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, None, 'none')
    weighted = mmcv_ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, weight, 'none')
    assert_close(weighted, plain * weight[target][:, None])


def deform_input():
    torch.manual_seed(0)
    features = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(2, 18, 6, 6, dtype=torch.float64)
    return features, offset, weight


def test_deformable_convolution_without_offsets_is_convolution(provided):
    features, offset, weight = deform_input()
    output = mmcv_ops.deform_conv2d(features, offset, weight, 1, 1)
    expected = F.conv2d(features, weight, padding=1)
    assert_close(output, expected)
    inputs = features, weight
    assert_close(
        torch.autograd.grad(output.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
    )
    # Where only the weight needs a gradient, mmcv asks for that alone.
    output = mmcv_ops.deform_conv2d(features.detach(), offset, weight, 1, 1)
    expected = F.conv2d(features, weight, padding=1)
    assert_close(
        torch.autograd.grad(output.square().sum(), weight),
        torch.autograd.grad(expected.square().sum(), weight),
    )


def test_deformable_convolution_twice_backward(provided):
    features, offset, weight = deform_input()
    output = mmcv_ops.deform_conv2d(features, offset, weight, 1, 1)
    first = torch.autograd.grad(output.sum(), weight, retain_graph=True)
    second = torch.autograd.grad(3 * output.sum(), weight)
    assert_close(second[0], 3 * first[0])


def test_offsets_move_by_row_and_column(provided):
    features, offset, _ = deform_input()
    offset[:, ::2], offset[:, 1::2] = 1, 2  # down by 1, right by 2
    weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    weight[range(4), range(4), 1, 1] = 1
    output = mmcv_ops.deform_conv2d(features, offset, weight, 1, 1)
    assert_close(output[..., :5, :4], features[..., 1:, 2:])
    assert not output[..., 5, :].any() and not output[..., 4:].any()


def test_mask_and_bias_of_modulated_deformable_convolution(provided):
    features, offset, weight = deform_input()
    mask = torch.full((2, 9, 6, 6), 0.5, dtype=torch.float64, requires_grad=True)
    bias = torch.ones(3, dtype=torch.float64, requires_grad=True)
    output = mmcv_ops.modulated_deform_conv2d(
        features, offset, mask, weight, bias, 1, 1
    )
    assert_close(output, F.conv2d(features, weight, padding=1) / 2 + 1)
    grads = torch.autograd.grad(output.sum(), (bias, mask))
    assert grads[0].tolist() == [72, 72, 72]
    # Of a sample: its features times the sum of the weights
    expected = torch.einsum('bchw,oc->bhw', features, weight[:, :, 1, 1])
    assert_close(grads[1][:, 4], expected)


@pytest.mark.parametrize(
    'make', [mmcv_ops.DeformConv2dPack, mmcv_ops.ModulatedDeformConv2dPack]
)
def test_autocast(provided, make):
    torch.manual_seed(0)
    module, features = make(4, 4, 3, padding=1), torch.randn(1, 4, 8, 8)
    rois = torch.tensor([[0.0, 1, 1, 6, 5]])
    expected = mmcv_ops.roi_align(module(features), rois, 2)
    with torch.autocast('cpu', torch.bfloat16):
        output = module(features)
        output = mmcv_ops.roi_align(output, rois.to(output), 2)
    output.float().sum().backward()
    assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_multi_scale_deformable_attention(provided):
    module = import_module('mmcv.ops.multi_scale_deform_attn')
    torch.manual_seed(0)
    shapes = torch.tensor([[4, 3], [2, 2]])
    inputs = [
        torch.randn(2, 16, 2, 4, dtype=torch.float64, requires_grad=True),
        torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True),
        torch.rand(2, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True),
    ]
    value, locations, weights = inputs
    # What mmcv calls on a GPU, and what elsewhere
    output = module.MultiScaleDeformableAttnFunction.apply(
        value, shapes, torch.tensor([0, 12]), locations, weights, 64
    )
    expected = module.multi_scale_deformable_attn_pytorch(
        value, shapes, locations, weights
    )
    assert_close(output, expected)
    assert_close(
        torch.autograd.grad(output.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
    )


def test_masked_convolution(provided):
    torch.manual_seed(0)
    convolution = mmcv_ops.MaskedConv2d(3, 2, (3, 5), padding=(1, 2))
    features = torch.randn(1, 3, 6, 7)
    mask = torch.rand(1, 6, 7) > 0.5
    with torch.no_grad():
        output = convolution(features, mask)
        assert_close(
            output,
            F.conv2d(features, convolution.weight, convolution.bias, padding=(1, 2))
            * mask,
        )
        assert not convolution(features, torch.zeros_like(mask)).any()


def test_other_operators_name_themselves_when_called(provided):
    with pytest.raises(
        NotImplementedError, match='roi_pool_forward .*MMELA_MMCV=compiled'
    ):
        mmcv_ops.roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)
    with pytest.raises(AttributeError, match='__path__'):
        mmcv_ext.__path__  # noqa: B018


def test_finder_is_installed_once_and_last():
    before = list(sys.meta_path)
    provide_operators()
    assert sys.meta_path == before
    names = [type(finder).__name__ for finder in before]
    assert names.count('_OperatorFinder') == 1


# --- without a compiled mmcv, in processes of their own ----------------------


@pytest.fixture(scope='module')
def lite(tmp_path_factory):
    """A folder with mmcv but its compiled module, as mmcv-lite has it."""
    folder = tmp_path_factory.mktemp('lite')
    source = Path(sys.modules['mmcv'].__file__).parent
    shutil.copytree(
        source,
        folder / 'mmcv',
        ignore=shutil.ignore_patterns('_ext.*', 'csrc', '__pycache__'),
    )
    return folder


def python(*arguments, path=(), autoload=False):
    """Run Python in a process of its own, with folders first on its path.

    Unless ``autoload``, torch calls no entry points, whatever mmela is installed.
    """
    paths = [*map(str, path), str(ROOT)]
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(paths),
        TORCH_DEVICE_BACKEND_AUTOLOAD=str(int(autoload)),
    )
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def detect(path=()):
    result = python('-m', 'tests.helpers.detectors', path=path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.split('REPORT')[1])


@pytest.fixture(scope='module')
def report(lite):
    return detect([lite])


@needs_mmdet
def test_detectors_without_compiled_mmcv(report):
    assert report['operators'].startswith('none: operators of torchvision')
    assert report['found'] and report['source'].endswith('mmcv_ext.py')
    assert 'roi_pool_forward' in report['refusal']
    for name, result in report['results'].items():
        assert math.isfinite(result['loss']) and result['grads'] > 0, name
        assert all(0 < len(boxes) <= 50 for boxes in result['boxes']), name
    assert any(map(any, report['results']['mask_rcnn']['mask_areas']))


@needs_mmdet
@needs_compiled
def test_detections_are_those_of_compiled_mmcv(report):
    compiled = detect()
    assert compiled['source'].endswith(('.so', '.pyd'))
    assert compiled['results'] == report['results']


@needs_mmdet
def test_order_of_imports(lite):
    """What docs/operators.md says about it."""
    code = """
try:
    import mmdet.apis
except ModuleNotFoundError as error:
    print(error)
import mmela
import mmdet.apis
print('second time fine')

# A new process, as workers of data loaders are on Windows and macOS
from multiprocessing import get_context
import mmcv.ops
worker = get_context('spawn').Process(target=mmcv.ops.get_compiler_version)
worker.start()
worker.join()
print(worker.exitcode)
"""
    result = python('-c', code, path=[lite])
    # A fork has a line of its own to say first.
    assert result.stdout.split('\n')[-4:] == [
        "No module named 'mmcv._ext'",
        'second time fine',
        '0',
        '',
    ], result.stderr


@pytest.fixture(scope='module')
def metadata(tmp_path_factory):
    """A folder with what an installation of mmela tells torch."""
    folder = tmp_path_factory.mktemp('metadata')
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', folder],
        cwd=ROOT,
        check=True,
    )
    return folder


AUTOLOADS = hasattr(torch, '_import_device_backends')  # from 2.5 on


@needs_mmdet
@pytest.mark.skipif(not AUTOLOADS, reason='torch calls entry points from 2.5 on')
def test_torch_provides_operators(lite, metadata):
    """An installed mmela serves programs that do not import it."""
    code = """
import sys, mmdet.apis, mmcv.ops
assert 'mmela' not in sys.modules
print(mmcv.ops.get_compiler_version(), sys.modules['mmcv._ext'].__file__)
"""
    result = python('-c', code, path=[lite, metadata], autoload=True)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith('none: operators of torchvision')
    assert last.endswith('mmcv_ext.py')


@pytest.mark.skipif(not AUTOLOADS, reason='torch calls entry points from 2.5 on')
@pytest.mark.parametrize('kind', ['beside', 'damaged', 'found late'])
def test_torch_leaves_compiled_operators_alone(lite, metadata, tmp_path, kind):
    """Also one that does not load, whose own error is seen."""
    folder = tmp_path / 'mmcv'
    folder.mkdir()
    (folder / '__init__.py').touch()
    late = ''
    if kind == 'damaged':
        (folder / f'_ext{EXTENSION_SUFFIXES[0]}').write_bytes(b'no library')
    else:
        place = folder if kind == 'beside' else tmp_path
        (place / '_ext.py').write_text('mark = 1')
    if kind == 'found late':  # by a finder that is added after ours
        late = f"""
from importlib.util import spec_from_file_location
class Late:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv._ext':
            return spec_from_file_location(name, {str(tmp_path / '_ext.py')!r})
sys.meta_path.append(Late())
"""
    code = f'import sys, torch\n{late}\nimport mmcv._ext; print(mmcv._ext.mark)'
    result = python('-c', code, path=[tmp_path, metadata], autoload=True)
    if kind == 'damaged':
        assert result.returncode and '_ext' in result.stderr.splitlines()[-1]
    else:
        assert result.stdout == '1\n', result.stderr


@needs_mmdet
def test_operators_in_the_folder_of_mmcv(lite, tmp_path, monkeypatch):
    """mmdet's own tools then need no mmela."""
    shutil.copytree(lite / 'mmcv', tmp_path / 'mmcv')
    spec = ModuleSpec('mmcv', None, origin=str(tmp_path / 'mmcv' / '__init__.py'))
    monkeypatch.setattr('mmela.compat.operators.find_spec', lambda name: spec)
    path = write_operators()
    assert path == tmp_path / 'mmcv' / '_ext.py'
    code = 'import mmdet.apis, sys; assert "mmela" not in sys.modules'
    result = python('-c', code, path=[tmp_path])
    assert result.returncode == 0, result.stderr
    assert remove_operators() == path and not path.exists()
    with pytest.raises(FileNotFoundError, match='_ext.py'):
        remove_operators()


@needs_compiled
def test_compiled_operators_are_left_alone(monkeypatch):
    assert Path(sys.modules['mmcv._ext'].__file__).suffix in ('.so', '.pyd')
    with pytest.raises(FileExistsError, match='mmcv has compiled operators'):
        write_operators()
    monkeypatch.setattr(sys, 'argv', ['operators.py', 'write'])
    with pytest.raises(SystemExit, match='error: mmcv has compiled operators'):
        runpy.run_path(str(ROOT / 'tools' / 'operators.py'), run_name='__main__')
