from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import save_checkpoint

pytest.importorskip('mmpretrain')

from mmpretrain.registry import MODELS  # noqa: E402

import mmela  # noqa: E402, F401
from mmela.layers import AttentionState  # noqa: E402
from mmela.models.backbones.mixin import LayerAttentionMixin  # noqa: E402
from tests.helpers.fresh import check  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
NARROW = dict(
    type='ELAResNet',
    depth=50,
    stem_channels=8,
    base_channels=8,
    layer_attention=dict(type='MRLABase', head_dim=8),
)


@pytest.fixture
def messages(monkeypatch):
    """What mmengine says about keys that do not match."""
    from mmengine.runner import checkpoint

    lines = []
    monkeypatch.setattr(
        checkpoint,
        'print_log',
        lambda msg, *args, **kwargs: lines.extend(str(msg).splitlines()),
    )
    return lines


def randomize(module):
    """Give every parameter and statistic a value of its own."""
    for param in module.parameters():
        torch.nn.init.normal_(param, 0.05, 0.1)
    for name, buffer in module.named_buffers():
        if name.endswith('running_var'):
            torch.nn.init.uniform_(buffer, 0.5, 2)
        elif name.endswith('running_mean'):
            torch.nn.init.normal_(buffer)


def test_same_mixin_and_type_in_both_toolboxes():
    for name in ('ELAResNet', 'mmpretrain.ELAResNet'):
        backbone = MODELS.build(dict(NARROW, type=name))
        assert isinstance(backbone, LayerAttentionMixin)
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    mmdet = pytest.importorskip('mmdet.registry').MODELS
    assert issubclass(mmdet.get('ELAResNet'), LayerAttentionMixin)
    assert mmdet.get('ELAResNet') is not MODELS.get('ELAResNet')


def pruned_classifier(path):
    """Checkpoint of a trained, pruned classifier."""
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=NARROW,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=3, in_channels=256),
        )
    )
    randomize(model)
    model.backbone.layer3[2].layer_attn.attention_state = AttentionState.PRUNED
    model.backbone.layer4[1].layer_attn.attention_state = AttentionState.VALUE_ONLY
    save_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(path))
    return model


@pytest.mark.parametrize('reset', [False, True])
def test_classifier_checkpoint_in_a_detector(tmp_path, config_dir, reset, messages):
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    mmdet = pytest.importorskip('mmdet.registry').MODELS
    path = tmp_path / 'classifier.pth'
    classifier = pruned_classifier(path)
    cfg = Config.fromfile(config_dir / 'faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py')
    cfg.model.backbone.update(
        {k: v for k, v in NARROW.items() if k != 'type'},
        reset_pruning=reset,
        init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.'),
    )
    # The attentions of the frozen stage are those of the checkpoint.
    assert cfg.model.backbone.frozen_stages == 1
    cfg.model.backbone.layer_attention.zero_init = False
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    detector = mmdet.build(cfg.model)

    detector.backbone.init_weights()
    assert not any(
        word in line
        for line in messages
        for word in ('missing', 'unexpected', 'mismatch')
    )

    expected, state = classifier.backbone.state_dict(), detector.backbone.state_dict()
    assert expected.keys() == state.keys()
    for key, value in expected.items():
        if reset and key.endswith('layer_attn.state'):
            assert state[key] == 0
        else:
            assert torch.equal(state[key], value), key
    pruned = detector.backbone.layer3[2].layer_attn
    kept = detector.backbone.layer4[1].layer_attn
    if reset:
        assert pruned.active and kept.active
        assert all(p.requires_grad for p in pruned.parameters())
    else:
        assert pruned.attention_state == AttentionState.PRUNED
        assert kept.attention_state == AttentionState.VALUE_ONLY
        classifier.eval()
        detector.backbone.eval()
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(
            detector.backbone(x)[-1], classifier.backbone(x)[-1], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet'])
def test_torchvision_checkpoint(scope, tmp_path, monkeypatch, messages):
    """By mmengine's code for torchvision://, with the download replaced."""
    models = pytest.importorskip('torchvision.models')
    from mmengine.runner import checkpoint as loading

    if scope == 'mmdet':
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    registry = pytest.importorskip(f'{scope}.registry').MODELS
    torch.manual_seed(0)
    source = models.resnet50(weights=None)
    randomize(source)
    torch.save(source.state_dict(), tmp_path / 'resnet50.pth')
    urls = []

    def load_url(url, *args, **kwargs):
        urls.append(url)
        return torch.load(tmp_path / 'resnet50.pth', weights_only=True)

    monkeypatch.setattr(loading, 'load_from_http', load_url)
    backbone = registry.build(
        dict(
            type='ELAResNet',
            depth=50,
            init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
        )
    )
    backbone.init_weights()
    assert len(urls) == 1 and 'resnet50' in urls[0]
    missing = [
        key
        for line in messages
        if line.startswith('missing keys in source state_dict:')
        for key in line.partition(':')[2].replace(',', ' ').split()
    ]
    own = {k for k in backbone.state_dict() if 'layer_attn' in k}
    ignored = {k for k in own if k.endswith('num_batches_tracked')}
    assert set(missing) == own - ignored
    unexpected = [line for line in messages if 'unexpected key' in line]
    # The classifier is not the backbone's
    assert [u.partition(':')[2].strip() for u in unexpected] == ['fc.weight, fc.bias']
    state = backbone.state_dict()
    for key, value in source.state_dict().items():
        if not key.startswith('fc.'):
            assert torch.equal(state[key], value), key


WITHOUT_MMDET = """
import sys

class Hiding:
    # mmcv-lite has no compiled mmcv._ext
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmdet', 'mmseg') or \\
                name.startswith('mmcv._ext'):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(f) for f in sys.meta_path
                    if hasattr(f, 'find_spec')]
for name in ('mmdet', 'mmcv._ext'):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + ' is still found')
import mmela
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

out, data, root = sys.argv[1:]
cfg = Config.fromfile(root + '/configs/cifar/'
                      'resnet20-ela_1xb128_cifar10-folder.py')
cfg.work_dir = out
cfg.launcher = 'none'
for name in ('train', 'val', 'test'):
    loader = cfg[name + '_dataloader']
    loader.update(batch_size=4, num_workers=0, persistent_workers=False)
    loader.dataset.data_root = data
cfg.train_cfg.max_epochs = 2
cfg.custom_hooks[0].windows = [(1, 1)]
cfg.custom_hooks[0].policy = dict(type='FixedCount', count=1)
cfg.model.head.num_classes = 3
cfg.val_evaluator.topk = cfg.test_evaluator.topk = (1, )
runner = Runner.from_cfg(cfg)
runner.train()
from mmela.structure import layer_attentions
states = [int(a.attention_state) for a in layer_attentions(runner.model).values()]
assert len(states) == 6
print('pruned', states.count(2))
assert not any(m.split('.')[0] in ('mmdet', 'mmseg') for m in sys.modules)
"""


def test_without_mmdet_and_with_mmcv_lite(tmp_path):
    """Train, prune and evaluate a classifier where mmdet cannot be found."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for cls in 'abc':
            folder = tmp_path / 'data' / split / cls
            folder.mkdir(parents=True)
            for i in range(4):
                cv2.imwrite(
                    str(folder / f'{i}.png'),
                    rng.integers(0, 256, (32, 32, 3), np.uint8),
                )
    output = check(WITHOUT_MMDET, tmp_path / 'run', tmp_path / 'data', ROOT)
    assert 'pruned 1' in output
    assert (tmp_path / 'run' / 'pruning.json').is_file()


def test_vision_transformer_trains_its_embeddings():
    """Nothing is frozen that nobody has asked to freeze."""
    arch = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=32)
    cfg = dict(type='ELAVisionTransformer', arch=arch, img_size=32)
    cfg['layer_attention'] = dict(type='MRLABase', head_dim=16)
    net = MODELS.build(cfg)
    net.train()
    assert all(p.requires_grad for p in net.parameters())
    net = MODELS.build(dict(cfg, frozen_stages=1))
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert 'pos_embed' in frozen and 'layers.0.ln1.weight' in frozen
    assert not any(n.startswith('layers.1') for n in frozen)
