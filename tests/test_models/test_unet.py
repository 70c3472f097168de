"""The U-Net with layer attention, its loss and its data."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner

pytest.importorskip('mmseg', exc_type=ImportError)
pytest.importorskip('mmcv.ops', exc_type=ImportError)

from mmseg.registry import MODELS  # noqa: E402

from mmela.tools import lesions as tool  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MRLA = dict(type='MRLABase', head_dim=16)
LIGHT = dict(type='MRLALight', head_dim=16)
KCLA = dict(type='KCLA', head_dim=16, head_attention='plain')
ATTENTIONS = [None, MRLA, LIGHT, KCLA]


def encoder(layer_attention=None, **kwargs):
    torch.manual_seed(0)
    if layer_attention is None:
        return MODELS.build(dict(type='UNetResNet', **kwargs))
    return MODELS.build(
        dict(type='ELAUNetResNet', layer_attention=layer_attention, **kwargs)
    )


def segmentor(config):
    cfg = Config.fromfile(ROOT / 'configs' / 'unet' / config)
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(cfg.model)


class TestBackbones:
    @pytest.mark.parametrize('attention', ATTENTIONS, ids=str)
    def test_encoder(self, attention):
        """All feature maps; every parameter gets a gradient."""
        model = encoder(attention)
        model.init_weights()
        outs = model(torch.randn(2, 3, 48, 64))
        assert [tuple(x.shape[1:]) for x in outs] == [
            (16, 48, 64),
            (32, 24, 32),
            (64, 12, 16),
            (128, 6, 8),
            (128, 6, 8),
        ]
        sum(x.square().mean() for x in outs).backward()
        for name, param in model.named_parameters():
            assert param.grad is None or param.grad.isfinite().all(), name
            if param.requires_grad:
                assert param.grad is not None, name

    def test_channels_of_the_attentions(self):
        ela = encoder(LIGHT)
        channels = [
            block.layer_attn.channels
            for name in ela.res_layers
            for block in getattr(ela, name)
        ]
        assert channels == [32, 32, 64, 64, 128, 128, 128, 128]

    def test_widths(self):
        """A bottleneck expands the width of each stage fourfold."""
        model = encoder(
            MRLA,
            depth=50,
            stage_channels=(16, 8, 24, 4),
            strides=(1, 2, 2, 2),
            stem_channels=8,
            out_indices=(1, 3),
            deep_stem=True,
        )
        shapes = [tuple(x.shape[1:]) for x in model(torch.randn(1, 3, 32, 32))]
        assert shapes == [(8, 32, 32), (32, 16, 16), (16, 4, 4)]
        assert model.feat_dim == 16

    def test_same_as_resnet_where_widths_double(self):
        """Stages of an ordinary ResNet, on the output of the stem."""
        resnet = MODELS.build(
            dict(type='ResNet', depth=18, base_channels=8, stem_channels=16)
        )
        model = encoder(stage_channels=(8, 16, 32, 64), strides=(1, 2, 2, 2))
        for param in model.parameters():
            torch.nn.init.normal_(param, 0.05, 0.1)
        resnet.load_state_dict(model.state_dict())
        stem, *outs = model(torch.randn(2, 3, 32, 32))
        for index, out in enumerate(outs, 1):
            stem = getattr(resnet, f'layer{index}')(stem)
            torch.testing.assert_close(out, stem)

    @pytest.mark.parametrize(
        ('kwargs', 'message'),
        [
            (dict(stage_channels=(8, 8)), r'stage_channels=\(8, 8\).* 4 stages'),
            (dict(strides=(1, 2, 2)), r'strides=\(1, 2, 2\).* 4 stages'),
        ],
    )
    def test_wrong_number_of_stages(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            encoder(**kwargs)

    def test_base_channels(self):
        with pytest.raises(TypeError, match='stage_channels'):
            encoder(base_channels=8)


# Millions of parameters in table IV of KCLA
@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        ('plain', 1.53),
        ('mrla-light', 1.54),
        ('kcla', 1.55),
    ],
)
def test_parameters_are_those_of_the_paper(name, millions):
    model = segmentor(f'unet_r18_{name}_kvasir-256x256.py')
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 0.006


class TestHead:
    def build(self, **kwargs):
        cfg = dict(
            type='UNetHead',
            in_channels=(4, 8, 8),
            decoder_channels=(8, 4),
            num_classes=2,
            dropout_ratio=0,
        )
        return MODELS.build({**cfg, **kwargs})

    def test_odd_sizes(self):
        head = self.build()
        maps = [
            torch.randn(2, c, h, w) for c, h, w in ((4, 33, 21), (8, 17, 11), (8, 9, 6))
        ]
        assert head(maps).shape == (2, 2, 33, 21)

    def test_every_map_matters(self):
        head = self.build().eval()
        maps = [torch.randn(1, c, 8, 8) for c in (4, 8, 8)]
        with torch.no_grad():
            before = head(maps)
            for index in range(3):
                changed = list(maps)
                changed[index] = changed[index] + 1
                assert not torch.allclose(head(changed), before)

    @pytest.mark.parametrize(
        'kwargs',
        [
            dict(decoder_channels=(8, 4, 4)),
            dict(in_channels=(4,), decoder_channels=()),
        ],
        ids=str,
    )
    def test_bad_channels(self, kwargs):
        with pytest.raises(ValueError, match='one entry fewer'):
            self.build(**kwargs)


class TestForegroundDiceLoss:
    def test_value(self):
        """One image of four pixels, by hand."""
        loss = MODELS.build(dict(type='ForegroundDiceLoss'))
        pred = torch.tensor([0.0, math.log(3), -math.log(3), 0.0])
        target = torch.tensor([[[1, 1], [0, 0]]])
        # Probabilities 1/2, 3/4, 1/4, 1/2: intersection 5/4, sums 2 and 2
        expected = 1 - (2 * 1.25 + 1) / (2 + 2 + 1)
        value = loss(pred.view(1, 1, 2, 2), target)
        torch.testing.assert_close(value, torch.tensor(expected))

    def test_ignored_pixels_do_not_count(self):
        loss = MODELS.build(dict(type='ForegroundDiceLoss'))
        pred = torch.randn(2, 1, 5, 4, requires_grad=True)
        target = torch.randint(0, 2, (2, 5, 4))
        target[:, :, 2:] = 255
        value = loss(pred, target)
        torch.testing.assert_close(value, loss(pred[..., :2], target[..., :2]))
        value.backward()
        assert pred.grad.isfinite().all()
        assert (pred.grad[..., 2:] == 0).all()
        assert (pred.grad[..., :2] != 0).all()

    def test_agrees_with_cross_entropy_on_the_direction(self):
        target = torch.randint(0, 2, (1, 6, 6))
        pred = torch.zeros(1, 1, 6, 6, requires_grad=True)
        loss = MODELS.build(dict(type='ForegroundDiceLoss'))
        (dice,) = torch.autograd.grad(loss(pred, target), pred)
        (cross,) = torch.autograd.grad(
            F.binary_cross_entropy_with_logits(pred[:, 0], target.float()), pred
        )
        assert (dice.sign() == cross.sign()).all()

    def test_two_channels(self):
        loss = MODELS.build(dict(type='ForegroundDiceLoss'))
        with pytest.raises(ValueError, match='out_channels=1, got 2'):
            loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3).long())


# -- data --------------------------------------------------------------------


@pytest.fixture(scope='module')
def lesions(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'lesions'
    assert tool.render(path, train=24, val=8, size=64, seed=1) == (24, 8)
    return path


def files(folder, *parts):
    return sorted(folder.joinpath(*parts).iterdir())


class TestRender:
    def test_images_and_masks(self, lesions):
        for split, count in (('train', 24), ('val', 8)):
            images = files(lesions, 'images', split)
            masks = files(lesions, 'masks', split)
            assert [p.name for p in images] == [p.name for p in masks]
            assert len(images) == count
            for image, mask in zip(images, masks):
                pixels = cv2.imread(str(image))
                label = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
                assert pixels.shape == (64, 64, 3) and label.shape == (64, 64)
                assert set(np.unique(label)) == {0, 1}
                assert 0.01 < label.mean() < 0.7
                # A lesion is darker than the skin, but no threshold finds it
                inside = pixels.mean(-1)[label == 1]
                outside = pixels.mean(-1)[label == 0]
                assert inside.mean() < outside.mean()
                assert inside.max() > outside.min()

    def test_same_arguments_same_data(self, lesions, tmp_path):
        tool.render(tmp_path / 'few', train=2, val=1, size=64, seed=1)
        tool.render(tmp_path / 'other', train=2, val=1, size=64, seed=2)
        for path in (p for p in (tmp_path / 'few').rglob('*.png')):
            name = path.relative_to(tmp_path / 'few')
            assert path.read_bytes() == (lesions / name).read_bytes()
            other = tmp_path / 'other' / name
            assert path.read_bytes() != other.read_bytes()

    @pytest.mark.parametrize(
        ('kwargs', 'message'),
        [
            (dict(train=0), 'train must be at least 1, got 0'),
            (dict(size=8), 'size must be 32 to 2048, got 8'),
        ],
    )
    def test_bad_arguments(self, kwargs, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            tool.render(tmp_path / 'x', **kwargs)
        assert not list(tmp_path.iterdir())


class TestConvert:
    @pytest.fixture
    def isic(self, tmp_path):
        """Ten images and masks that are named as in ISIC 2017."""
        for name in ('input', 'truth'):
            (tmp_path / name).mkdir()
        for index in range(10):
            mask = np.zeros((40, 60), np.uint8)
            mask[10:30, 5 + index : 40] = 255
            # Compression as in the masks of Kvasir-SEG: not only 0 and 255
            mask[10:30, 5 + index] = 200
            mask[9, :] = 55
            image = np.full((40, 60, 3), 20 * index, np.uint8)
            name = f'ISIC_{index:07d}'
            cv2.imwrite(str(tmp_path / 'input' / f'{name}.jpg'), image)
            ending = '_Segmentation' if index == 5 else '_segmentation'
            cv2.imwrite(str(tmp_path / 'truth' / f'{name}{ending}.png'), mask)
            cv2.imwrite(str(tmp_path / 'input' / f'{name}_superpixels.png'), image)
        return tmp_path

    def convert(self, isic, out='out', **kwargs):
        kwargs = {**dict(size=64), **kwargs}
        return tool.convert(isic / out, [isic / 'input'], [isic / 'truth'], **kwargs)

    def test_split_and_masks(self, isic):
        assert self.convert(isic) == (7, 3)
        names = []
        for split, count in (('train', 7), ('val', 3)):
            masks = files(isic / 'out', 'masks', split)
            assert len(masks) == count
            names += [p.name for p in masks]
            for path in masks:
                index = int(path.stem[-1])
                mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
                assert mask.shape == (64, 64)
                assert set(np.unique(mask)) == {0, 1}
                share = 20 * (35 - index) / (40 * 60)
                assert abs(mask.mean() - share) < 0.02
                image = cv2.imread(str(isic / 'out' / 'images' / split / path.name))
                assert abs(image.mean() - 20 * index) < 3
        assert sorted(names) == [f'ISIC_{i:07d}.png' for i in range(10)]

    def test_seed(self, isic):
        def training(out, seed):
            self.convert(isic, out, seed=seed)
            return [p.name for p in files(isic / out, 'images', 'train')]

        assert training('a', 1) == training('b', 1) != training('c', 2)

    def test_mask_without_image(self, isic):
        (isic / 'input' / 'ISIC_0000003.jpg').unlink()
        with pytest.raises(ValueError, match='0003_segmentation.png has no image'):
            self.convert(isic)
        assert not (isic / 'out').exists()

    def test_wrong_size_leaves_nothing(self, isic):
        path = isic / 'truth' / 'ISIC_0000003_segmentation.png'
        cv2.imwrite(str(path), np.zeros((4, 4), np.uint8))
        with pytest.raises(ValueError, match='has 4 x 4 pixels, but its image'):
            self.convert(isic)
        assert {p.name for p in isic.iterdir()} == {'input', 'truth'}

    def test_no_image(self, isic):
        path = isic / 'truth' / 'ISIC_0000003_segmentation.png'
        path.write_bytes(b'')
        with pytest.raises(ValueError, match='not an image that OpenCV can read'):
            self.convert(isic)

    def test_existing_data_stay(self, isic):
        (isic / 'out').mkdir()
        (isic / 'out' / 'file').write_text('mine')
        with pytest.raises(FileExistsError):
            self.convert(isic)
        assert (isic / 'out' / 'file').read_text() == 'mine'

    def test_command_line(self, isic, capsys):
        main = tool.main
        with pytest.raises(SystemExit, match='^error: there is no folder'):
            main(
                [
                    'convert',
                    str(isic / 'x'),
                    '--images',
                    str(isic / 'no'),
                    '--masks',
                    str(isic / 'truth'),
                ]
            )
        with pytest.raises(SystemExit, match='^error: there are 1 folders of images'):
            main(
                [
                    'convert',
                    str(isic / 'x'),
                    '--images',
                    str(isic / 'input'),
                    '--masks',
                    str(isic / 'truth'),
                    str(isic / 'truth'),
                ]
            )
        with pytest.raises(SystemExit, match='^error: train_share'):
            main(
                [
                    'convert',
                    str(isic / 'x'),
                    '--images',
                    str(isic / 'input'),
                    '--masks',
                    str(isic / 'truth'),
                    '--train-share',
                    '1',
                ]
            )
        main(['render', str(isic / 'x'), '--train', '1', '--val', '1'])
        assert '1 training and 1 validation' in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(['--help'])
        assert 'mmela lesions render data' in capsys.readouterr().out


# -- training ----------------------------------------------------------------


def test_learning_rate_of_the_recipe():
    """1e-3 down to 1e-5 in 50 epochs, and up again in 50."""
    cfg = Config.fromfile(
        ROOT / 'configs' / 'unet' / 'unet_r18_plain_kvasir-256x256.py'
    )
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr
    )
    scheduler = PARAM_SCHEDULERS.build(
        dict(cfg.param_scheduler[0], optimizer=optimizer)
    )
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    for epoch, rate in (
        (0, 1e-3),
        (25, 5.05e-4),
        (50, 1e-5),
        (100, 1e-3),
        (150, 1e-5),
        (275, 5.05e-4),
    ):
        assert rates[epoch] == pytest.approx(rate, rel=1e-6)


def test_one_epoch_on_generated_images(lesions, tmp_path):
    """From a config through the runner to metrics that are right."""
    cfg = Config.fromfile(ROOT / 'configs' / 'unet' / 'unet_r18_kcla_lesions-96x96.py')
    cfg.work_dir = str(tmp_path)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.data_root = str(lesions)
        loader.update(num_workers=0, persistent_workers=False, batch_size=4)
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.default_hooks.checkpoint.interval = 1
    cfg.default_hooks.logger.interval = 1
    cfg.log_level = 'WARNING'
    cfg.experiment_name = f'segmentation_{tmp_path.name}'
    runner = Runner.from_cfg(cfg)
    runner.train()

    lines = (
        (tmp_path / runner.timestamp / 'vis_data' / 'scalars.json')
        .read_text()
        .splitlines()
    )
    logged = [json.loads(line) for line in lines]
    losses = [item['loss'] for item in logged if 'loss' in item]
    assert len(losses) == 6 and min(losses) < losses[0]
    metrics = [item for item in logged if 'mIoU' in item]
    assert len(metrics) == 1 and 0 < metrics[0]['mIoU'] < 100
    assert 0 < metrics[0]['mDice'] < 100
    assert list(tmp_path.glob('best_mDice_epoch_1.pth'))

    # The metrics by hand, from the predictions of the trained network
    model = runner.model.eval()
    areas = np.zeros((3, 2))
    with torch.no_grad():
        for batch in runner.val_dataloader:
            for sample in model.val_step(batch):
                pred = sample.pred_sem_seg.data.numpy()[0]
                name = Path(sample.img_path).name
                label = cv2.imread(
                    str(lesions / 'masks' / 'val' / name), cv2.IMREAD_UNCHANGED
                )
                for index in (0, 1):
                    a, b = pred == index, label == index
                    areas[:, index] += (a & b).sum(), a.sum(), b.sum()
    both, pred, label = areas
    miou = 100 * np.mean(both / (pred + label - both))
    mdice = 100 * np.mean(2 * both / (pred + label))
    assert metrics[0]['mIoU'] == pytest.approx(miou, abs=0.01)
    assert metrics[0]['mDice'] == pytest.approx(mdice, abs=0.01)
