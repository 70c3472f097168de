"""Score-CAM: against pytorch-grad-cam's own, and by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

# Not a requirement: pip install grad-cam==1.5.5
pytest.importorskip('pytorch_grad_cam', exc_type=ImportError)
pytest.importorskip('mmpretrain')

from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from pytorch_grad_cam import ScoreCAM  # noqa: E402
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

from mmela.analysis import cam  # noqa: E402
from mmela.analysis.inputs import input_picture  # noqa: E402
from mmela.analysis.patch_attention import PatchSize  # noqa: E402
from mmela.structure import attention_stages, prune  # noqa: E402
from mmela.visualization.drawing import draw_over_image  # noqa: E402
from tests.helpers.networks import transformer  # noqa: E402


@pytest.fixture
def classifier():
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='ELAResNet',
                depth=18,
                base_channels=8,
                stem_channels=8,
                layer_attention=dict(type='MRLABase', head_dim=4),
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=64),
            data_preprocessor=dict(mean=[127.5] * 3, std=[50.0] * 3),
        )
    )
    model.eval()
    return model


def batch(height=40, width=56):
    image = torch.randint(
        256, (3, height, width), generator=torch.Generator().manual_seed(1)
    ).byte()
    from mmpretrain.structures import DataSample

    return dict(inputs=[image], data_samples=[DataSample()])


@pytest.mark.parametrize('batch_size', [16, 5])
def test_equals_the_librarys(classifier, batch_size):
    layer = cam.target_layer(classifier, 'layer2.1')
    assert layer is classifier.backbone.layer2[1]
    hooks = dict(layer._forward_hooks)
    inputs = torch.randn(1, 3, 40, 56)
    targets = [ClassifierOutputTarget(3)]
    expected = ScoreCAM(classifier, [layer])(inputs, targets)
    steps = []
    found = cam.StreamedScoreCAM(classifier, layer, batch_size, progress=steps.append)(
        inputs, targets
    )
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert sum(steps) == 16 and max(steps) == min(batch_size, 16)
    assert dict(layer._forward_hooks) == hooks


class Brightness(nn.Module):
    """Scores an image by the sum of its left half; its layer looks at both."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1, bias=False)
        self.layer.weight.data.zero_()
        self.layer.weight.data[0, 0] = self.layer.weight.data[1, 1] = 1

    def forward(self, x):
        self.layer(x)
        return x[..., :4].sum((1, 2, 3))[:, None]


def test_finds_what_counts():
    """Channel 0 sees the left half, channel 1 the right half."""
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, :, :4] = image[0, 1, :, 4:] = 1
    model = Brightness()
    weights = cam.StreamedScoreCAM(model, model.layer).get_cam_weights(
        image,
        model.layer,
        [ClassifierOutputTarget(0)],
        model.layer(image).detach().numpy(),
        None,
    )
    # Masked by channel 0, the sum is 32; by channel 1, it is 0.
    np.testing.assert_allclose(
        weights, torch.tensor([[32.0, 0.0]]).softmax(1), atol=1e-6
    )
    found = cam.StreamedScoreCAM(model, model.layer)(
        image, [ClassifierOutputTarget(0)]
    )[0]
    np.testing.assert_allclose(found[:, :4], 1, atol=1e-5)
    np.testing.assert_allclose(found[:, 4:], 0, atol=1e-5)


def test_select_channels():
    maps = torch.tensor([[0.0, 9], [5, 5], [0, 1], [3, -7]]).view(4, 1, 2)
    assert cam.select_channels(maps, 2).tolist() == [0, 3]
    for number in (None, 4, 99):
        assert cam.select_channels(maps, number).tolist() == [0, 1, 2, 3]


def test_image_of_a_classifier(classifier, tmp_path):
    data = batch()
    cams = cam.ImageCAM([classifier, classifier], data)
    with torch.no_grad():
        inputs = classifier.data_preprocessor(batch(), False)['inputs']
        predicted = classifier(inputs)[0].argmax().item()
    assert cams.target == f'predicted class {predicted}'
    maps = {'layer1.1': cams.compute(0, 'layer1.1', max_channels=3)}
    assert maps['layer1.1'].shape == (40, 56)
    assert maps['layer1.1'].min() >= 0 and maps['layer1.1'].max() <= 1
    picture = input_picture(data)
    # BGR, as it is read, to RGB
    np.testing.assert_allclose(
        picture[..., 0], data['inputs'][0][2].numpy() / 255, atol=1e-6
    )
    draw_over_image(
        tmp_path / 'x.png',
        picture,
        dict(a=maps, b=maps),
        dict(a={}, b={'layer1.1': 'note'}),
        'costs $1 or $2',
        (10, 5, 8, 8),
    )
    with Image.open(tmp_path / 'x.png') as image:
        assert image.width > 3 * 200
    prune(classifier, ['backbone.layer2.1.layer_attn'])
    notes = cams.notes(0)
    assert notes['layer2.1'] == 'attention pruned' and not notes['layer1.0']
    assert notes['layer1.1'].startswith('KL ')


def test_blocks(classifier):
    assert cam.last_blocks(classifier) == [f'layer{i}.1' for i in range(1, 5)]
    block = classifier.backbone.layer1[0]
    handed_on = cam.target_layer(classifier, 'backbone.layer1.0')
    assert handed_on is block
    seen = []
    for layer in (block, block.layer_attn):
        layer.register_forward_hook(
            lambda module, args, out: seen.append((args[0], out))
        )
    classifier(torch.randn(1, 3, 40, 56))
    (output, retrieved), (_, found) = seen
    assert torch.equal(found, output + retrieved) and retrieved.any()
    assert cam.channel_count(classifier, 'layer1.0') == 8
    assert cam.channel_count(classifier, 'layer4.1') == 64


def test_blocks_of_other_backbones():
    """Blocks of a list that is no stage of its own."""
    init_default_scope('mmpretrain')
    model = nn.Module()
    model.backbone = MODELS.build(
        dict(
            type='ELAEfficientNet',
            arch='b0',
            layer_attention=dict(type='MRLALight', head_dim=8),
        )
    )
    names = cam.last_blocks(model)
    layer = cam.target_layer(model, names[-1])
    *_, last = attention_stages(model.backbone).values()
    assert layer is [*last.blocks.values()][-1]
    outputs = []
    layer.register_forward_hook(lambda m, args, out: outputs.append(out))
    model.backbone.eval()
    model.backbone(torch.randn(1, 3, 32, 32))
    assert outputs[0].shape[1] == cam.channel_count(model, names[-1])


def test_tokens_equal_the_librarys():
    """With the library's own way to make maps of tokens."""
    model = transformer()
    assert cam.last_blocks(model) == ['layers.1']
    assert cam.channel_count(model, 'layers.0') == 12
    inputs, targets = torch.randn(1, 3, 32, 48), [ClassifierOutputTarget(3)]
    expected = ScoreCAM(
        model,
        [model.backbone.layers[0]],
        reshape_transform=lambda x: (
            x[:, 1:].reshape(len(x), 4, 6, 12).permute(0, 3, 1, 2)
        ),
    )(inputs, targets)
    data = dict(inputs=[torch.zeros(3, 32, 48)], data_samples=[None])
    model.data_preprocessor.forward = lambda data, training: dict(
        inputs=inputs, data_samples=data['data_samples']
    )
    cams = cam.ImageCAM([model], data, target=3)
    assert expected.std() > 0.01
    np.testing.assert_allclose(cams.compute(0, 'layers.0'), expected[0], atol=1e-4)
    hooks = [m._forward_hooks for m in model.modules()]
    assert not any(hooks)


def test_tokens_with_layer_attention():
    """What the next layer is given, without the class token."""
    model = transformer(
        type='ELAVisionTransformer', layer_attention=dict(type='MRLALight', head_dim=4)
    )
    seen, given = [], []
    size = PatchSize(model.backbone)
    cam.target_layer(model, 'layers.0').register_forward_hook(
        lambda module, args, out: seen.append(size.to_map(out))
    )
    model.backbone.layers[1].register_forward_pre_hook(
        lambda module, args: given.append(args[0])
    )
    model(torch.randn(2, 3, 32, 48))
    expected = given[0][:, 1:].reshape(2, 4, 6, 12).permute(0, 3, 1, 2)
    assert torch.equal(seen[0], expected)


def test_errors(classifier):
    with pytest.raises(ValueError, match='layer9.9; allowed are layer1.0, layer1.1'):
        cam.target_layer(classifier, 'layer9.9')
    for target in (-1, 5):
        with pytest.raises(ValueError, match=f'target={target}.* 0 to 4'):
            cam.ImageCAM([classifier], batch(), target)
    with pytest.raises(ValueError, match='Linear is neither'):
        cam.is_detector(nn.Linear(1, 1))
    with pytest.raises(ValueError, match='backbone of Linear'):
        cam.target_layers(nn.Linear(1, 1))
