"""Images of any number of channels, in all that runs a network."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torchvision import models

from mmela import attach_layer_attention
from mmela.analysis.complexity import backbone_complexity, count_flops, kept_memory
from mmela.analysis.inputs import as_colours, input_picture
from mmela.analysis.report import make_report
from mmela.analysis.work_dir import Run
from mmela.convert.export import export_backbone
from mmela.convert.slim import slim_network
from mmela.inference import PREDICTIONS, infer
from mmela.structure import layer_attentions, prune
from tests.helpers.attachable import Conv
from tests.helpers.networks import save
from tests.helpers.work_dirs import make_work_dir
from tests.helpers.zoo import (
    CONVNEXT,
    HRNET,
    RESNET,
    SWIN,
    VIT,
    equal,
    run,
    timm,
    toolbox,
    torchvision,
)

CHANNELS = (1, 2, 4, 6, 13)
SIZE = (64, 96)
VIT_SIZE = dict(img_size=SIZE, patch_size=16)


def gray(make, channels):
    """torchvision's networks are changed by hand."""
    network = make()
    network.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return network


def networks(n):
    return {
        'mmdet.ResNet': toolbox('mmdet', 'ResNet', in_channels=n, **RESNET),
        'mmdet.HRNet': toolbox('mmdet', 'HRNet', in_channels=n, extra=HRNET),
        'mmdet.Swin': toolbox('mmdet', 'SwinTransformer', in_channels=n, **SWIN),
        'mmdet.PVTv2': toolbox(
            *('mmdet', 'PyramidVisionTransformerV2'),
            in_channels=n,
            embed_dims=8,
            num_layers=[2, 2, 2, 2],
        ),
        'mmpretrain.ConvNeXt': toolbox(
            'mmpretrain', 'ConvNeXt', in_channels=n, arch=CONVNEXT
        ),
        'mmpretrain.ViT': toolbox(
            'mmpretrain', 'VisionTransformer', in_channels=n, arch=VIT, **VIT_SIZE
        ),
        'mmseg.UNet': toolbox('mmseg', 'UNet', in_channels=n, base_channels=4),
        'mmseg.ViT': toolbox(
            *('mmseg', 'VisionTransformer'),
            in_channels=n,
            embed_dims=32,
            num_layers=4,
            num_heads=2,
            **VIT_SIZE,
        ),
        'timm.resnet18': timm('resnet18', in_chans=n, num_classes=2),
        'timm.vit': timm('test_vit', in_chans=n, img_size=SIZE),
        'timm.features': timm('resnet18', in_chans=n, features_only=True),
        'torchvision': lambda: gray(torchvision('resnet18', num_classes=2), n),
    }


def build(name, channels):
    torch.manual_seed(0)
    network = networks(channels)[name]()
    network.eval()
    return network


@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('name', networks(3))
def test_read_from_the_network(name, channels):
    plain, network = build(name, channels), build(name, channels)
    attach_layer_attention(network, dict(type='MRLABase', zero_init=True))
    network.eval()
    x = torch.randn(2, channels, *SIZE)
    assert len(layer_attentions(network)) > 2
    assert equal(run(network, x), run(plain, x))
    # As of the same network on colours
    names = list(layer_attentions(attach_layer_attention(build(name, 3))))
    assert list(layer_attentions(network)) == names


class Odd(nn.Module):
    """Its first convolution sees less than it is handed."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, 1, 1)
        self.rest = nn.Conv2d(channels - 1, 8, 3, 1, 1)
        self.blocks = nn.Sequential(Conv(8, 8), Conv(8, 8))
        self.register_buffer('mean', torch.ones(channels, 1, 1))

    def forward(self, x):
        x = x - self.mean
        return self.blocks(self.first(x[:, :2]) + self.rest(x[:, 1:]))


@pytest.mark.parametrize('channels', (*CHANNELS[1:], 3))
def test_given_as_an_argument(tmp_path, channels):
    network = attach_layer_attention(
        Odd(channels), input_channels=channels, input_size=(16, 24)
    )
    assert len(layer_attentions(network)) == 2
    network(torch.randn(2, channels, 16, 24))
    assert count_flops(network.eval(), (16, 24)) > 0
    assert kept_memory(nn.Sequential(network), (16, 24)) > 0
    export_backbone(network, tmp_path / 'net.pt', size=(16, 24))
    torch.jit.load(tmp_path / 'net.pt')(torch.randn(1, channels, 16, 24))
    with pytest.raises(ValueError, match='input_channels'):
        attach_layer_attention(
            Odd(channels), input_channels=channels + 1, input_size=(16, 24)
        )


@pytest.mark.parametrize('value', [0, -1, 1.5, '3', True, 5])
@pytest.mark.parametrize('known', [False, True])
def test_bad_argument(value, known):
    network = models.resnet18() if known else Odd(4)
    with pytest.raises(ValueError, match=f'input_channels={value!r}|{value} channels'):
        attach_layer_attention(network, input_channels=value)


@pytest.mark.parametrize('value', [0, (16,), (16, 0), '224', (1.5, 2)])
@pytest.mark.parametrize('known', [False, True])
def test_bad_size(value, known):
    network = models.resnet18() if known else Odd(4)
    with pytest.raises(ValueError, match='input_size='):
        attach_layer_attention(network, input_size=value)


@pytest.mark.parametrize('given', [None, 4])
def test_in_a_config(given):
    pytest.importorskip('mmseg.models')
    more = dict(input_channels=given) if given else {}
    with DefaultScope.overwrite_default_scope('mmseg'):
        network = MODELS.build(
            dict(
                type='mmela.WithLayerAttention',
                backbone=dict(type='UNet', in_channels=4, base_channels=4),
                **more,
            )
        )
    assert layer_attentions(network)


def backbone(kind, channels):
    attention = dict(type='MRLABase', head_dim=8)
    if kind == 'ELAResNet':
        narrow = dict(RESNET, in_channels=channels)
        return dict(type='ELAResNet', layer_attention=attention, **narrow)
    plain = dict(type='ConvNeXt', arch=CONVNEXT, in_channels=channels)
    return dict(
        type='mmela.WithLayerAttention', backbone=plain, layer_attention=attention
    )


WIDTH = dict(ELAResNet=128, ConvNeXt=32)


def classifier(kind, channels):
    how = 'grayscale' if channels == 1 else 'unchanged'
    pipeline = [
        dict(type='LoadImageFromFile', color_type=how),
        dict(type='Resize', scale=(64, 64)),
        dict(type='PackInputs'),
    ]
    return dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=backbone(kind, channels),
            neck=dict(type='GlobalAveragePooling') if kind == 'ELAResNet' else None,
            head=dict(type='LinearClsHead', num_classes=3, in_channels=WIDTH[kind]),
            data_preprocessor=dict(
                mean=[100.0] * channels, std=[50.0] * channels, to_rgb=False
            ),
        ),
        test_dataloader=dict(
            dataset=dict(pipeline=pipeline, metainfo=dict(classes=('a', 'b', 'c')))
        ),
    )


@pytest.fixture(params=CHANNELS)
def channels(request):
    pytest.importorskip('mmpretrain.models')
    return request.param


@pytest.mark.parametrize('kind', WIDTH)
def test_slim(tmp_path, kind, channels):
    config, checkpoint = save(tmp_path, 'net', classifier(kind, channels))
    cfg = Config.fromfile(config)
    with MODELS.switch_scope_and_registry('mmpretrain') as registry:
        network = registry.build(cfg.model)
    prune(network, list(layer_attentions(network))[1:3])
    torch.save(network.state_dict(), checkpoint)
    small = slim_network(config, checkpoint)
    assert small.attentions == 8
    with MODELS.switch_scope_and_registry('mmpretrain') as registry:
        new = registry.build(small.cfg.model)
    new.load_state_dict(small.state_dict)
    network.eval(), new.eval()
    x = torch.randn(2, channels, 64, 96)
    assert equal(run(new.backbone, x), run(network.backbone, x))


@pytest.mark.parametrize('kind', WIDTH)
def test_export(tmp_path, kind, channels):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        network = MODELS.build(backbone(kind, channels))
    export_backbone(network, tmp_path / 'net.pt', size=(64, 96))
    x = torch.randn(2, channels, 64, 96)
    found = run(torch.jit.load(tmp_path / 'net.pt'), x)
    network.eval()
    for out, expected in zip(found, run(network, x)):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', WIDTH)
def test_cost(kind, channels):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        counts = []
        for number in (channels, channels + 1):
            network = MODELS.build(backbone(kind, number))
            network.eval()
            counts.append(count_flops(network, (64, 64)))
            assert kept_memory(network, (64, 64)) > 0
    stem = dict(ELAResNet=16 * 7 * 7 * 32 * 32, ConvNeXt=8 * 4 * 4 * 16 * 16)
    assert counts[1] - counts[0] == stem[kind]


def test_report(tmp_path, channels):
    make_work_dir(tmp_path, {f'layer{stage}': 2 for stage in (1, 2, 3, 4)})
    cfg = Config(classifier('ELAResNet', channels))
    cfg.dump(tmp_path / 'my_config.py')
    costs, size, reason = backbone_complexity(Run(tmp_path))
    assert not reason and size == (64, 64)
    assert costs[0].flops > costs[-1].flops > 0
    if channels == 1:  # which the page, that takes long, is made of
        page = make_report(tmp_path).read_text('utf-8')
        assert 'does not run' not in page and 'cannot be counted' not in page


@pytest.mark.parametrize('number', [1, 4])
def test_inference(tmp_path, number):
    pytest.importorskip('mmpretrain.models')
    config, checkpoint = save(tmp_path, 'net', classifier('ELAResNet', number))
    shape = (64, 64, number)
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'x.png'), image)
    infer(config, checkpoint, [tmp_path / 'x.png'], tmp_path / 'out')
    assert cv2.imread(str(tmp_path / 'out' / 'x.png')).std() > 10
    content = json.loads((tmp_path / 'out' / PREDICTIONS).read_text())
    found = {x['category_id'] - 1: x['score'] for x in content['annotations']}

    with MODELS.switch_scope_and_registry('mmpretrain') as registry:
        network = registry.build(Config.fromfile(config).model)
    network.load_state_dict(torch.load(checkpoint)['state_dict'])
    network.eval()
    array = torch.from_numpy(image.reshape(64, 64, -1)).permute(2, 0, 1)
    with torch.no_grad():
        features = network.extract_feat((array[None].float() - 100) / 50)
        expected = network.head(features).softmax(-1)[0]
    assert len(found) == 3
    for index, score in found.items():
        assert abs(score - float(expected[index])) < 1e-4


@pytest.mark.parametrize('number', [1, 4])
def test_video(tmp_path, number):
    pytest.importorskip('mmpretrain.models')
    config, checkpoint = save(tmp_path, 'net', classifier('ELAResNet', number))
    video = tmp_path / 'x.avi'
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*'MJPG'), 5, (64, 64))
    for value in (20, 200):
        writer.write(np.full((64, 64, 3), value, np.uint8))
    writer.release()
    if number == 4:
        with pytest.raises(ValueError, match='3 channels, and the network takes 4'):
            infer(config, checkpoint, [video], tmp_path / 'out')
        assert not (tmp_path / 'out').exists()
        return
    infer(config, checkpoint, [video], tmp_path / 'out')
    content = json.loads((tmp_path / 'out' / PREDICTIONS).read_text())
    assert len(content['images']) == 2


@pytest.mark.parametrize('number', [1, 2, 3, 4, 6, 13])
def test_what_a_picture_shows(number):
    image = np.random.default_rng(0).integers(0, 255, (8, 9, number), dtype=np.uint8)
    first = image[..., [0, 1, 2]] if number >= 3 else image[..., [0, 0, 0]]
    inputs = torch.from_numpy(image.transpose(2, 0, 1))
    if number in (1, 3):
        assert equal_arrays(as_colours(image), first)
        picture = input_picture(dict(inputs=[inputs]))
    else:
        with pytest.warns(UserWarning, match=f'of {number} channels'):
            assert equal_arrays(as_colours(image), first)
        with pytest.warns(UserWarning, match=f'of {number} channels'):
            picture = input_picture(dict(inputs=[inputs]))
    np.testing.assert_allclose(picture * 255, first[..., ::-1], atol=1e-3)


def test_picture_of_16_bits():
    image = np.array([[0, 30000], [60000, 15000]], np.uint16)
    assert as_colours(image)[..., 1].tolist() == [[0, 127], [255, 63]]


def equal_arrays(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)
