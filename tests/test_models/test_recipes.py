"""Recipes against the papers and the authors' code, by their own formulas."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper  # noqa: F401  (registration)
from mmengine.registry import PARAM_SCHEDULERS

ROOT = Path(__file__).resolve().parents[2] / 'configs'


def read(name):
    pytest.importorskip('mmdet' if 'rcnn' in name else 'mmpretrain')
    return Config.fromfile(ROOT / f'{name}.py')


def learning_rates(cfg, epochs, per_epoch=4):
    """Learning rate in the first iteration of each epoch."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for scheduler in cfg.param_scheduler:
        scheduler = dict(scheduler, optimizer=optimizer)
        scheduler.setdefault('end', epochs)  # as the runner does
        name = scheduler['type']
        if scheduler.pop('convert_to_iter_based', False):
            cls = PARAM_SCHEDULERS.get(name)
            scheduler.pop('type')
            schedulers.append(
                cls.build_iter_from_epoch(epoch_length=per_epoch, **scheduler)
            )
        else:
            schedulers.append(PARAM_SCHEDULERS.build(scheduler))
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            for _ in range(1 if scheduler.by_epoch else per_epoch):
                scheduler.step()
    return rates


@pytest.mark.parametrize(
    'name, steps',
    [('resnet50-mrla-base', (30, 60, 90)), ('resnet101-kcla', (40, 70, 90))],
)
def test_imagenet_100_epochs(name, steps):
    """Warm-up and steps of the authors' training scripts."""
    rates = learning_rates(read(f'imagenet/{name}_8xb32_in1k'), 100)
    expected = [1e-4, 0.1 / 3, 0.2 / 3]
    expected += [0.1 * 0.1 ** sum(e >= s for s in steps) for e in range(3, 100)]
    assert rates == pytest.approx(expected, rel=2e-3)


def test_efficientnet():
    cfg = read('imagenet/efficientnet-b0-mrla-light_8xb96_in1k')
    rates = learning_rates(cfg, 350)
    assert rates[0] < 1e-4 and rates[:6] == sorted(rates[:6])
    expected = [0.048 * 0.97 ** math.floor(epoch / 2.4) for epoch in range(5, 350)]
    assert rates[5:] == pytest.approx(expected, rel=1e-6)
    assert cfg.model.backbone.norm_cfg.momentum == pytest.approx(1 - 0.99)
    assert cfg.model.head.dropout == 0.2


def test_dropout_before_the_classifier():
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS

    import mmela  # noqa: F401

    cfg = dict(type='DropoutLinearClsHead', num_classes=3, in_channels=1000)
    head = MODELS.build(dict(cfg, dropout=0.2))
    x = torch.ones(1, 1000)
    kept = head.pre_logits((x,))
    assert 120 < int((kept == 0).sum()) < 280
    assert kept.max() == pytest.approx(1 / 0.8)
    head.eval()
    assert torch.equal(head.pre_logits((x,)), x)
    assert set(head.state_dict()) == {'fc.weight', 'fc.bias'}
    with pytest.raises(ValueError, match='dropout=1 is not a probability'):
        MODELS.build(dict(cfg, dropout=1))


def test_adamw_clips_no_gradient():
    cfg = read('imagenet/deit-tiny-mrla-base_8xb128_in1k')
    assert cfg.optim_wrapper.get('clip_grad') is None
    rates = learning_rates(cfg, 300)
    assert rates[5] == max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize('name', ['deit-tiny', 'pvtv2-b0'])
def test_only_mrla_light_has_a_gelu(name):
    """MRLA, algorithms 2 and 4."""
    if name.startswith('pvt'):
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    from mmengine.registry import MODELS, init_default_scope

    for kind, gelu in (('base', False), ('light', True)):
        cfg = read(f'imagenet/{name}-mrla-{kind}_8xb128_in1k')
        init_default_scope('mmpretrain')
        backbone = MODELS.build(cfg.model.backbone)
        acts = [m for n, m in backbone.named_modules() if n.endswith('value_act')]
        assert acts
        assert all(isinstance(act, torch.nn.GELU) == gelu for act in acts)


@pytest.mark.parametrize('depth, images, lr', [(50, 8, 0.01), (101, 4, 0.005)])
@pytest.mark.parametrize('kind', ['faster', 'mask'])
def test_kcla_detectors(kind, depth, images, lr):
    """8 and 4 images on two GPUs, 0.02 for 16 scaled with them (section V-B)."""
    cfg = read(f'{kind}_rcnn/{kind}-rcnn_r{depth}_kcla_fpn_1x_coco')
    assert 2 * cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == images
    assert cfg.optim_wrapper.optimizer.lr == lr == 0.02 * images / 16
    assert cfg.randomness.seed == 42


def test_seeds_of_kcla():
    for path in ROOT.glob('*/*kcla*.py'):
        if path.parent.name != 'studies':
            folder = path.parent.name
            if folder == 'unet':
                pytest.importorskip('mmseg')
            assert read(f'{folder}/{path.stem}').randomness.seed == 42, path


@pytest.mark.parametrize('kind', ['faster_rcnn/faster-rcnn', 'mask_rcnn/mask-rcnn'])
def test_se_detectors_start_from_a_trained_network(kind):
    """Their stem and stage 1 are frozen."""
    for depth in (50, 101):
        cfg = read(f'{kind}_r{depth}_se_fpn_1x_coco').model.backbone
        assert cfg.init_cfg.type == 'Pretrained'
        assert f'resnet{depth}' in cfg.init_cfg.checkpoint
