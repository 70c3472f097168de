"""Every config reads, is listed, makes a training step and predicts."""

import copy
import json
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    HOOKS,
    MODELS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    init_default_scope,
)
from mmengine.structures import PixelData

ROOT = Path(__file__).resolve().parents[2] / 'configs'
SCOPES = dict(cifar='mmpretrain', imagenet='mmpretrain', unet='mmseg')
PATHS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in ROOT.glob('*/*.py')
    if not p.parent.name.startswith('_')
)
PAPERS = yaml.safe_load((ROOT / 'papers.yml').read_text('utf-8'))
done = {}


def scope_of(path):
    return SCOPES.get(path.split('/')[0], 'mmdet')


def skip_without(path):
    """What building the config needs."""
    pytest.importorskip(scope_of(path))
    if scope_of(path) != 'mmpretrain' or 'pvtv2' in path:
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    if '_se_' in path:
        pytest.importorskip('mmpretrain')
    if 'eca' in path or 'cbam' in path:
        pytest.importorskip('timm')


@lru_cache(maxsize=None)
def read(path):
    return Config.fromfile(ROOT / path)


@pytest.mark.parametrize('path', PATHS)
def test_reads_and_is_listed(path):
    folder, name = path.split('/')
    pytest.importorskip(scope_of(path))
    assert read(path).default_scope == scope_of(path)
    section = PAPERS.get(folder, dict(rows=[]))
    listed = {row['config'] for row in section['rows']}
    others = section.get('others', {})
    assert (
        folder == 'demo'
        or name[:-3] in listed
        or any(fnmatch(name[:-3], pattern) for pattern in others)
    )


def shrink(part):
    """The parts after a detector's backbone in an eighth of their width, and few boxes.

    They are mmdet's own; test_recipes.py counts the parameters of what they are.
    """
    for key, value in part.items():
        if isinstance(value, dict):
            shrink(value)
        elif value in (256, 1024) and key.endswith('_channels'):
            part[key] = value // 8
        elif key in ('nms_pre', 'max_per_img'):
            part[key] = min(value, 50)


def narrowed(cfg):
    """A ResNet in a quarter of its width, and a DeiT in the smallest: all as deep."""
    model = copy.deepcopy(cfg.model)
    backbone = model.backbone
    if backbone.get('init_cfg') and backbone.init_cfg.type == 'Pretrained':
        backbone.init_cfg = None
    if backbone.type in ('ResNet', 'ELAResNet', 'mmpretrain.SEResNet', 'SEResNet'):
        backbone.base_channels = backbone.get('base_channels', 64) // 4
        if cfg.default_scope == 'mmdet':
            model.neck.in_channels = [width // 4 for width in model.neck.in_channels]
        else:
            model.head.in_channels //= 4
    if str(backbone.get('arch')).startswith('deit-'):
        backbone.arch = 'deit-tiny'
        model.head.in_channels = 192
    if cfg.default_scope == 'mmdet':
        for key, part in model.items():
            if isinstance(part, dict) and key != 'backbone':
                shrink(part)
    if 'img_size' in backbone:
        backbone.img_size = 64
    if cfg.default_scope == 'mmpretrain':
        # As the runner does; CIFAR-10, CIFAR-100 and ImageNet in one
        model.data_preprocessor = copy.deepcopy(cfg.data_preprocessor)
        assert model.data_preprocessor.num_classes == model.head.num_classes
        model.data_preprocessor.num_classes = model.head.num_classes = 10
    return model


def batch(cfg, model):
    """Two images with what the model learns from."""
    torch.manual_seed(0)
    side = 32 if 'CIFAR' in model.backbone.type else 64
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        classes = model.get('bbox_head', model.get('roi_head', {}).get('bbox_head'))
        return demo_mm_inputs(
            2, [[3, side, side]] * 2, num_classes=classes.num_classes, with_mask=True
        )
    if cfg.default_scope == 'mmseg':
        from mmseg.structures import SegDataSample

        samples = []
        for _ in range(2):
            data = PixelData(data=torch.randint(0, 2, (1, side, side)))
            meta = dict(img_shape=(side, side), ori_shape=(side, side))
            samples.append(SegDataSample(gt_sem_seg=data, metainfo=meta))
    else:
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(label) for label in (3, 7)]
    images = [torch.randint(0, 256, (3, side, side), dtype=torch.uint8) for _ in '12']
    return dict(inputs=images, data_samples=samples)


def check_prediction(cfg, sample):
    if cfg.default_scope == 'mmpretrain':
        assert sample.pred_score.shape == (10,)
        assert float(sample.pred_score.sum()) == pytest.approx(1, abs=1e-4)
    elif cfg.default_scope == 'mmseg':
        assert set(sample.pred_sem_seg.data.unique().tolist()) <= {0, 1}
    else:
        instances = sample.pred_instances
        assert torch.isfinite(instances.bboxes).all()
        assert ('masks' in instances) == ('mask_head' in cfg.model.get('roi_head', {}))


@pytest.mark.parametrize('path', PATHS)
def test_trains_and_predicts(path):
    """One step of the config's optimizer; each parameter that trains has a gradient.

    Configs whose narrowed networks and optimizers are equal run once: those of
    CIFAR-10 and CIFAR-100, and ELA beside MRLA-base.
    """
    skip_without(path)
    cfg = read(path)
    model = narrowed(cfg)
    key = json.dumps([model.to_dict(), cfg.optim_wrapper.to_dict()], sort_keys=True)
    if key in done:
        return
    init_default_scope(cfg.default_scope)
    data = batch(cfg, model)
    network = MODELS.build(model)
    network.init_weights()
    network.train()
    optimizer = build_optim_wrapper(network, cfg.optim_wrapper)
    optimizer.zero_grad = lambda: None  # keeps the gradients of the step
    losses = network.train_step(data, optimizer)
    assert torch.isfinite(losses['loss'])
    for name, param in network.named_parameters():
        if param.requires_grad:
            assert param.grad is not None, f'{name} is not used'
            assert torch.isfinite(param).all(), name
    with torch.no_grad():
        samples = network.test_step(batch(cfg, model))
    assert len(samples) == 2
    for sample in samples:
        check_prediction(cfg, sample)
    done[key] = path


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_schedules_and_hooks(scope):
    """They can be built, and every window of the pruning lies within the training."""
    pytest.importorskip(scope)
    init_default_scope(scope)
    seen = set()
    for path in PATHS:
        if scope_of(path) != scope:
            continue
        cfg = read(path)
        parts = [cfg.get('custom_hooks', []), cfg.param_scheduler, cfg.train_cfg]
        if str(parts) in seen:
            continue
        seen.add(str(parts))
        epochs = cfg.train_cfg.max_epochs
        for hook in map(HOOKS.build, cfg.get('custom_hooks', [])):
            for start, end in getattr(hook, 'windows', []):
                assert 1 <= start <= end <= epochs, path
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
        for scheduler in cfg.param_scheduler:
            scheduler = dict(scheduler, optimizer=optimizer)
            assert scheduler.get('end', epochs) <= max(epochs, 500), path
            if scheduler.pop('convert_to_iter_based', False):
                cls = PARAM_SCHEDULERS.get(scheduler.pop('type'))
                cls.build_iter_from_epoch(
                    **{'end': epochs, **scheduler}, epoch_length=4
                )
            else:
                PARAM_SCHEDULERS.build(scheduler)
    assert len(seen) > 1


def pipelines(cfg):
    """The pipelines of training and test."""
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        data = loader.dataset
        yield data.get('pipeline') or data.dataset.pipeline


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_pipelines(scope, tmp_path):
    """Each makes an input of the network from an image."""
    pytest.importorskip(scope)
    init_default_scope(scope)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), pixels)
    cv2.imwrite(str(tmp_path / 'mask.png'), pixels[..., 0] % 2)
    square = [10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]
    instance = dict(
        bbox=square[:2] + square[4:6], bbox_label=1, mask=[square], ignore_flag=0
    )
    seen = set()
    for path in PATHS:
        if scope_of(path) != scope:
            continue
        for pipeline in pipelines(read(path)):
            if str(pipeline) in seen:
                continue
            seen.add(str(pipeline))
            sample = dict(
                img_path=str(tmp_path / 'image.png'),
                img_id=0,
                gt_label=3,
                instances=[instance],
                seg_map_path=str(tmp_path / 'mask.png'),
                seg_fields=[],
                reduce_zero_label=False,
            )
            if 'cifar' in path and 'folder' not in path:
                sample['img'] = pixels[:32, :32]
            steps = [TRANSFORMS.build(step) for step in pipeline]
            result = Compose(steps)(sample)
            assert result['inputs'].dtype == torch.uint8, path
            assert result['inputs'].ndim == 3 and 'data_samples' in result
    assert len(seen) > 1
