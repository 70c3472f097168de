"""Whole networks, exported, against what their toolboxes predict."""

import json
import logging

import numpy as np
import pytest
import torch

from mmela.convert.export import export_network
from mmela.convert.exported import ExportedDetector, paste_masks
from mmela.convert.whole import whole_network
from mmela.structure import prune
from tests.helpers.documents import ROOT, blocks
from tests.helpers.networks import classifier

pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
if not hasattr(torch.export.Dim, 'DYNAMIC'):
    pytest.skip('needs torch 2.6', allow_module_level=True)


@pytest.fixture(scope='module', autouse=True)
def no_trace_log():
    """The exporter writes thousands of records where pytest listens."""
    logger = logging.getLogger('torch.__trace')
    before, logger.propagate = logger.propagate, False
    yield
    logger.propagate = before


PRUNED = 'backbone.layer3.1.layer_attn'
KEPT = 'backbone.layer2.1.layer_attn'


def nodes_of(onnx_model, name):
    """Nodes that a module has left in a graph, and weights of it."""
    nodes = [
        node.name
        for node in onnx_model.graph.node
        for entry in node.metadata_props
        if entry.key.endswith('name_scopes') and f'.{name}' in entry.value
    ]
    weights = [w.name for w in onnx_model.graph.initializer if name in w.name]
    return len(nodes), len(weights)


def run_documented(word, **names):
    """Run the block of docs/deployment.md that has a word; what it has named."""
    (code,) = (
        block.text
        for block in blocks(ROOT / 'docs' / 'deployment.md')
        if block.language == 'python' and word in block.text
    )
    exec(code, names)
    return names


def build_classifier(pruned=()):
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS

    torch.manual_seed(0)
    model = MODELS.build(dict(classifier()['model'], _scope_='mmpretrain')).eval()
    prune(model, pruned)
    return model


@pytest.fixture(scope='module')
def exported_classifier(tmp_path_factory):
    model = build_classifier([PRUNED])
    path = tmp_path_factory.mktemp('classifier') / 'detector.onnx'  # as the page has it
    export_network(model, path, (40, 48), info=dict(classes=['a', 'b', 'c', 'd']))
    return model, path


def test_classifier(exported_classifier):
    """Also: of the pruned attention no node is left."""
    import onnx

    model, path = exported_classifier
    onnx_model = onnx.load(path)
    assert nodes_of(onnx_model, PRUNED) == (0, 0)
    nodes, weights = nodes_of(onnx_model, KEPT)
    assert nodes > 5 and weights > 2
    (given,) = onnx_model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert dims == ['batch', 3, 'height', 'width']
    meta = {entry.key: entry.value for entry in onnx_model.metadata_props}
    assert json.loads(meta['mmela']) == dict(
        classes=['a', 'b', 'c', 'd'], raw=True, outputs=['scores']
    )
    session = onnxruntime.InferenceSession(str(path))
    for shape in [(2, 3, 40, 48), (1, 3, 33, 70), (3, 3, 64, 64)]:
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.no_grad():
            data = model.data_preprocessor(dict(inputs=images))
            expected = torch.stack([s.pred_score for s in model.predict(**data)])
        (found,) = session.run(None, dict(images=images.numpy()))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_program_of_normalized_images(tmp_path):
    model = build_classifier()
    path = tmp_path / 'classifier.pt2'
    export_network(model, path, (40, 48), raw=False)
    assert all(p.requires_grad for p in model.parameters())  # as before
    program = torch.export.load(path).module()
    for shape in [(3, 3, 64, 96), (1, 3, 40, 48)]:
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model(x, mode='tensor').softmax(-1)
        (found,) = program(x)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_int8_by_onnxruntime(exported_classifier, monkeypatch):
    import onnx

    monkeypatch.chdir(exported_classifier[1].parent)
    pictures = [images(1, 64, 64 + n).numpy() for n in range(8)]
    run_documented('quantize_static', images=pictures)
    types = [node.op_type for node in onnx.load('detector_int8.onnx').graph.node]
    assert types.count('QuantizeLinear') > 5
    exact, quantized = (
        [onnxruntime.InferenceSession(f).run(None, dict(images=x))[0] for x in pictures]
        for f in ('detector.onnx', 'detector_int8.onnx')
    )
    assert not np.array_equal(exact, quantized)
    np.testing.assert_allclose(quantized, exact, atol=0.05)


def build_detector(name, **changes):
    """A small detector whose random weights tell boxes and classes apart."""
    pytest.importorskip('mmdet')
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    from mmela.command_line import find_config

    register_all_modules()
    cfg = Config.fromfile(find_config(f'mmdet::{name}'))
    model = cfg.model
    model.backbone.update(
        type='ELAResNet',
        depth=18,
        base_channels=8,
        init_cfg=None,
        layer_attention=dict(type='MRLABase', head_dim=8),
    )
    # Two levels of the backbone and one of FPN's own are enough
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16, start_level=2)
    model.neck.num_outs = 3
    heads = [model.get('bbox_head'), model.get('rpn_head')]
    for head in filter(None, heads):
        head.update(in_channels=16, feat_channels=16)
        head.anchor_generator.strides = [16, 32, 64]
    if 'roi_head' in model:
        roi_head = model.roi_head
        for part in (roi_head.bbox_roi_extractor, roi_head.get('mask_roi_extractor')):
            if part:
                part.update(out_channels=16, featmap_strides=[16, 32])
        roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=3)
        if 'mask_head' in roi_head:
            roi_head.mask_head.update(
                in_channels=16, conv_out_channels=16, num_classes=3
            )
        model.test_cfg.rpn.update(nms_pre=3000, max_per_img=3000)
        model.test_cfg.rcnn.update(score_thr=0.3, max_per_img=300)
    else:
        model.bbox_head.num_classes = 3
        model.test_cfg.update(nms_pre=5000, score_thr=0.5, max_per_img=2000)
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model).eval()
    detector.init_weights()
    # Far from sure, and not of one mind
    if 'roi_head' in model:
        layers = {detector.roi_head.bbox_head.fc_cls: 10, detector.rpn_head.rpn_cls: 9}
    else:
        layers = {detector.bbox_head.retina_cls: 3e3}
    for layer, factor in layers.items():
        layer.weight.data *= factor
        torch.nn.init.zeros_(layer.bias)
    return detector


DETECTORS = dict(
    retinanet='retinanet/retinanet_r50_fpn_1x_coco.py',
    mask_rcnn='mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
)


def images(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    coarse = torch.rand(shape[0], 3, 9, 9, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, shape[1:], mode='bilinear')
    noise = torch.rand(smooth.shape, generator=generator) * 60 - 30  # no ties
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def samples(x, scale=1.0):
    from mmdet.structures import DetDataSample

    height, width = x.shape[-2:]
    meta = dict(
        img_shape=(height, width),
        ori_shape=(round(height / scale), round(width / scale)),
        scale_factor=(scale, scale),
    )
    return [DetDataSample(metainfo=dict(meta)) for _ in x]


def predictions(detector, x, **kwargs):
    """What mmdet predicts."""
    data = dict(inputs=list(x), data_samples=samples(x, **kwargs))
    with torch.no_grad():
        return [sample.pred_instances for sample in detector.test_step(data)]


@pytest.fixture(scope='module', params=DETECTORS)
def exported(request, tmp_path_factory):
    detector = build_detector(DETECTORS[request.param])
    prune(detector, [PRUNED])
    path = tmp_path_factory.mktemp('exported') / 'detector.onnx'
    export_network(detector, path, (224, 288))
    return detector, path


def matched(found, expected):
    """Share of detections that have a counterpart."""
    pairs = (
        ((found['boxes'][:, None] - expected['boxes']).abs().amax(-1) < 0.1)
        & ((found['scores'][:, None] - expected['scores']).abs() < 1e-4)
        & (found['labels'][:, None] == expected['labels'])
    )
    return float(pairs.any(1).float().mean()) if len(pairs) else 1.0


@pytest.mark.parametrize('shape', [(2, 224, 288), (1, 250, 161), (3, 192, 200)])
def test_detections(exported, shape):
    """The module detects exactly what mmdet does, the file what the module does.

    In the file only most, as scores of random weights are so close that rounding
    changes which box suppresses which. Trained ones all match: docs/deployment.md.
    """
    detector, path = exported
    session = onnxruntime.InferenceSession(str(path))
    network = whole_network(detector)
    x = images(*shape)
    with torch.no_grad():
        results = dict(zip(network.output_names, network(x)))
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, dict(images=x.numpy()))
    file = {name: torch.from_numpy(v) for name, v in zip(names, values)}
    for index, expected in enumerate(predictions(detector, x)):
        number = len(expected)
        assert number > 3
        found = {name: value[index] for name, value in results.items()}
        assert (found['labels'] >= 0).sum() == number
        assert not found['scores'][number:].any()
        own = dict(
            boxes=expected.bboxes, scores=expected.scores, labels=expected.labels
        )
        if 'masks' in found:
            pasted = paste_masks(found['masks'][:number], expected.bboxes, x.shape[-2:])
            assert expected.masks.any()
            assert (pasted != expected.masks).float().mean() < 1e-4
        found = {name: value[:number] for name, value in found.items()}
        # In any order, as some scores are equal
        assert matched(found, own) == matched(own, found) == 1
        other = {name: v[index][file['labels'][index] >= 0] for name, v in file.items()}
        assert min(matched(found, other), matched(other, found)) > 0.8


def test_no_detection(exported):
    """An image without an object gives no error and nothing."""
    detector, path = exported
    black = torch.zeros(1, 3, 160, 160, dtype=torch.uint8)
    (expected,) = predictions(detector, black)
    found = ExportedDetector(path)(list(black), samples(black))[0].pred_instances
    assert len(found) == len(expected)


def test_pruned_attentions_leave_no_node_in_a_detector(exported):
    import onnx

    onnx_model = onnx.load(exported[1])
    assert nodes_of(onnx_model, PRUNED) == (0, 0)
    assert min(nodes_of(onnx_model, KEPT)) > 2


def test_detector_in_a_runner(exported):
    """With boxes and masks in pixels of the original image."""
    detector, path = exported
    x = images(1, 224, 288)
    (expected,) = predictions(detector, x, scale=2.0)
    data = dict(inputs=list(x), data_samples=samples(x, scale=2.0))
    found = ExportedDetector(path).test_step(data)[0].pred_instances
    one, other = (
        dict(boxes=r.bboxes, scores=r.scores, labels=r.labels)
        for r in (found, expected)
    )
    assert len(found) > 3 and matched(other, one) > 0.8
    if 'masks' in expected:
        assert found.masks.shape == expected.masks.shape == (len(found), 112, 144)


def test_documented_use(exported, monkeypatch):
    _, path = exported
    monkeypatch.chdir(path.parent)
    if 'masks' in whole_network(exported[0]).output_names:
        pytest.skip('the page shows boxes')
    found = run_documented('InferenceSession')
    assert found['boxes'].shape == (1, 2000, 4)


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    detector = build_detector('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    path = tmp_path_factory.mktemp('program') / 'detector.pt2'
    export_network(detector, path, (224, 288))
    return detector, path, ExportedDetector(path)


def test_program_of_a_detector(program):
    """Smallest maps of even and odd sizes, as FPN takes every other pixel of one."""
    detector, _, runs = program
    for shape in [(1, 224, 288), (1, 250, 161), (1, 192, 256), (1, 97, 130)]:
        x = images(*shape)
        (found,) = runs(list(x), samples(x))
        (expected,) = predictions(detector, x)
        one, other = (
            dict(boxes=r.bboxes, scores=r.scores, labels=r.labels)
            for r in (found.pred_instances, expected)
        )
        assert len(one['boxes']) == len(expected) > 3
        assert matched(one, other) == matched(other, one) == 1


def test_program_finds_nothing(program):
    detector, _, runs = program
    black = torch.zeros(1, 3, 224, 288, dtype=torch.uint8)
    assert len(predictions(detector, black)[0]) == 0
    (found,) = runs(list(black), samples(black))
    assert len(found.pred_instances) == 0


def test_documented_use_of_a_program(program, monkeypatch):
    monkeypatch.chdir(program[1].parent)
    found = run_documented('torch.export.load')
    assert found['boxes'].shape == (1, 300, 4)


def test_openvino(exported):
    openvino = pytest.importorskip('openvino')
    _, path = exported
    x = images(1, 192, 224).numpy()
    expected = onnxruntime.InferenceSession(str(path)).run(None, dict(images=x))
    exact = dict(INFERENCE_PRECISION_HINT='f32')
    network = openvino.Core().compile_model(path, 'CPU', exact)
    names = 'boxes', 'scores', 'labels'
    one, other = (
        {n: torch.from_numpy(v[0].copy()) for n, v in zip(names, values)}
        for values in (list(network(x).values()), expected)
    )
    assert (other['labels'] >= 0).sum() > 3 and matched(other, one) > 0.8


def test_what_is_refused(tmp_path):
    cascade = build_detector(
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        **{'test_cfg.rcnn.nms': dict(type='soft_nms', iou_threshold=0.5)},
    )
    with pytest.raises(ValueError, match=r"type='soft_nms'.*Supported are .*Mask"):
        whole_network(cascade)
    classifier_ = build_classifier()
    classifier_.head = torch.nn.Identity()
    with pytest.raises(ValueError, match=r'the head Identity\. Supported are'):
        whole_network(classifier_)
    with pytest.raises(ValueError, match=r'support Linear\. Supported are'):
        whole_network(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r'must end with \.onnx .* or \.pt2'):
        export_network(build_classifier(), tmp_path / 'x.pt')


def test_another_kind_of_two_stages_is_refused():
    pytest.importorskip('mmdet')
    from mmdet.models.roi_heads import StandardRoIHead

    detector = build_detector(DETECTORS['mask_rcnn'])

    class Cascade(StandardRoIHead):
        pass

    detector.roi_head.__class__ = Cascade
    with pytest.raises(ValueError, match='two-stage detector with a Cascade'):
        whole_network(detector)
