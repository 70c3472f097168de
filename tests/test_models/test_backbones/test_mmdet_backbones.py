import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

from mmdet.registry import MODELS  # noqa: E402

import mmela  # noqa: E402, F401
from mmela.attach import wiring  # noqa: E402
from mmela.layers import AttentionState  # noqa: E402
from mmela.structure import layer_attentions  # noqa: E402


def build(type='ELAResNet', **kwargs):
    cfg = dict(type=type, depth=50, base_channels=8, **kwargs)
    if type == 'ELAResNet':
        attention = dict(type='MRLABase', head_dim=8)
        attention.update(kwargs.get('layer_attention', {}))
        cfg['layer_attention'] = attention
    torch.manual_seed(0)
    return MODELS.build(cfg)


def test_both_ways_to_name_it():
    for name in ('ELAResNet', 'mmdet.ELAResNet'):
        assert type(build(name)).__module__.startswith('mmela.')


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(depth=18),
        dict(depth=34),
        dict(depth=101),
        dict(depth=152),
        dict(style='caffe', norm_cfg=dict(type='BN', requires_grad=False)),
        dict(deep_stem=True, avg_down=True),
        dict(dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1)),
        dict(out_indices=(1, 3)),
        dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 2)),
        dict(norm_cfg=dict(type='GN', num_groups=2)),
        dict(
            plugins=[
                dict(
                    cfg=dict(type='ContextBlock', ratio=1.0 / 4),
                    stages=(False, True, True, True),
                    position='after_conv3',
                )
            ]
        ),
        dict(
            dcn=dict(type='DCN', deform_groups=1, fallback_on_stride=False),
            stage_with_dcn=(False, True, True, True),
        ),
    ],
    ids=str,
)
def test_arguments_of_resnet(kwargs):
    """Same feature shapes and keys as ResNet; every parameter gets a grad."""
    cfg = dict(depth=50, norm_eval=False, zero_init_residual=False)
    cfg.update(kwargs)
    torch.manual_seed(0)
    ela = MODELS.build(
        dict(
            type='ELAResNet',
            base_channels=8,
            layer_attention=dict(type='MRLABase', head_dim=8),
            **copy.deepcopy(cfg),
        )
    )
    resnet = MODELS.build(dict(type='ResNet', base_channels=8, **copy.deepcopy(cfg)))
    x = torch.randn(2, 3, 129, 97)
    outs, expected = ela(x), resnet(x)
    assert [o.shape for o in outs] == [e.shape for e in expected]
    own = {k for k in ela.state_dict() if '.layer_attn.' not in k}
    assert own == set(resnet.state_dict())

    sum(out.square().mean() for out in outs).backward()
    for name, param in ela.named_parameters():
        if '.layer_attn.' in name:
            assert param.requires_grad, name
        if param.requires_grad:
            assert param.grad is not None, name


def test_with_cp_gives_the_same_gradients():
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        model = build(with_cp=with_cp)
        model(x)[-1].square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


@pytest.mark.parametrize('frozen_stages', [-1, 1, 4])
@pytest.mark.parametrize('norm_eval', [False, True])
def test_zero_init_starts_as_the_resnet_it_loads(frozen_stages, norm_eval):
    common = dict(frozen_stages=frozen_stages, norm_eval=norm_eval)
    resnet = build('ResNet', zero_init_residual=False, **common)
    for param in resnet.parameters():
        torch.nn.init.normal_(param, 0.05, 0.1)
    ela = build(layer_attention=dict(zero_init=True), **common)
    ela.init_weights()
    keys = ela.load_state_dict(resnet.state_dict(), strict=False)
    # Frozen stages have no attention that would stay zero.
    assert bool(keys.missing_keys) == (frozen_stages < 4)
    assert not keys.unexpected_keys
    assert all('.layer_attn.' in key for key in keys.missing_keys)
    x = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        ela.train(mode)
        resnet.train(mode)
        for out, expected in zip(ela(x), resnet(x)):
            assert torch.equal(out, expected)


def counts(model):
    """Number of attentions of each stage."""
    names = list(layer_attentions(model))
    return [sum(n.startswith(f'layer{i}.') for n in names) for i in range(1, 5)]


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2])
def test_zero_init_leaves_frozen_stages_alone(frozen_stages, monkeypatch):
    said = []
    monkeypatch.setattr(wiring, 'print_log', lambda text, *args: said.append(text))
    model = build(frozen_stages=frozen_stages, layer_attention=dict(zero_init=True))
    frozen = max(frozen_stages, 0)
    assert counts(model) == [0] * frozen + [3, 4, 6, 3][frozen:]
    # The table says so, and only where it is so
    (table,) = said
    lines = [line for line in table.splitlines() if 'are frozen' in line]
    assert len(lines) == frozen
    assert all(f'none: layer{i + 1}.0 ...' in line for i, line in enumerate(lines))
    # Attentions of a frozen stage that start otherwise come from a checkpoint.
    assert counts(build(frozen_stages=frozen_stages)) == [3, 4, 6, 3]
    # A memory that crosses stages is gone on with in the next one.
    kcla = dict(type='KCLA', head_dim=8, zero_init=True)
    assert counts(build(frozen_stages=1, layer_attention=kcla)) == [3, 4, 6, 3]
    kcla['cross_stage'] = False
    assert counts(build(frozen_stages=1, layer_attention=kcla)) == [0, 4, 6, 3]


def test_small_init_leaves_frozen_stages_alone_and_takes_part():
    config = dict(small_init=0.2, norm_cfg=dict(type='GN', num_groups=4))
    model = build(frozen_stages=1, norm_eval=True, layer_attention=config)
    model.init_weights()
    model.train()
    assert counts(model)[0] == 0
    attention = model.layer2[0].layer_attn
    assert (attention.norm.weight == 0.2).all()
    for out in model(torch.randn(2, 3, 64, 64))[1:]:
        out.square().mean().backward(retain_graph=True)
    # Unlike with zero_init all of it has a gradient at once.
    assert all(param.grad.any() for param in attention.value.parameters())
    query = model.layer2[1].layer_attn.query.weight  # the first sees one token
    assert query.grad.any()


def test_small_init_where_a_frozen_stage_keeps_its_attention():
    kcla = dict(type='KCLA', head_dim=8, small_init=0.2)
    model = build(frozen_stages=1, layer_attention=kcla)
    model.init_weights()
    # It would be random for ever, so it adds nothing.
    assert not model.layer1[0].layer_attn.norm.weight.any()
    assert (model.layer2[0].layer_attn.norm.weight == 0.2).all()


@pytest.mark.parametrize('blocks', [[1, 0], [0, 0], [0, 3], [-1]])
def test_attention_blocks_in_order_and_once_each(blocks):
    with pytest.raises(ValueError, match=r'blocks\[1\].* 0 to 3') as error:
        build(
            attention_blocks=[[0], [*blocks, 7] if blocks == [0, 3] else blocks, [], []]
        )
    assert 'in ascending order, each once' in str(error.value)


def test_zero_init_false_differs_from_resnet():
    resnet = build('ResNet')
    ela = build()
    ela.load_state_dict(resnet.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(ela(x)[0], resnet(x)[0])


@pytest.mark.parametrize('zero_init', [False, True])
def test_init_weights_keeps_zero_init(zero_init):
    """The backbone's own init sets every norm weight to 1."""
    model = build(layer_attention=dict(zero_init=zero_init))
    model.init_weights()
    for name, param in model.named_parameters():
        if name.endswith('layer_attn.norm.weight'):
            assert (param == (0 if zero_init else 1)).all(), name


def test_frozen_stages_freeze_the_attention():
    model = build(frozen_stages=2)
    for name, param in model.named_parameters():
        frozen = name.startswith(('conv1', 'bn1', 'layer1', 'layer2'))
        assert param.requires_grad != frozen, name


def test_kcla_after_a_frozen_stage():
    """The memory that it takes over has no gradient, and needs none."""
    model = build(frozen_stages=1, layer_attention=dict(type='KCLA', head_dim=8))
    model(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
    for name, param in model.named_parameters():
        assert param.requires_grad == (param.grad is not None), name


def test_pruned_state_in_checkpoint(tmp_path):
    model = build()
    model.layer2[1].layer_attn.attention_state = AttentionState.PRUNED
    model.layer3[4].layer_attn.attention_state = AttentionState.VALUE_ONLY
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    other = build()
    other.load_state_dict(torch.load(tmp_path / 'model.pth'))
    x = torch.randn(1, 3, 64, 64)
    assert not other.layer2[1].layer_attn.active
    assert all(torch.equal(a, b) for a, b in zip(model(x), other(x)))


@pytest.mark.parametrize('layer_attention', ['MRLABase', dict(head_dim=8)])
def test_bad_layer_attention(layer_attention):
    with pytest.raises(TypeError, match='layer_attention must be a dict'):
        MODELS.build(dict(type='ELAResNet', depth=50, layer_attention=layer_attention))


def test_bad_head_dim():
    with pytest.raises(ValueError, match='head_dim=48 .* 32 channels'):
        build(layer_attention=dict(head_dim=48))


# Trainable parameters in millions: of MRLA-light as MRLA prints them (tables 2
# and 3) and of ELA as ELA prints them (table 5).
@pytest.mark.parametrize(
    'config, light, ela',
    [
        ('faster_rcnn/faster-rcnn_r50_ela_fpn_1x_coco.py', 41.70, 41.7),
        ('faster_rcnn/faster-rcnn_r101_ela_fpn_1x_coco.py', 60.90, 60.9),
        ('mask_rcnn/mask-rcnn_r50_ela_fpn_1x_coco.py', 44.34, 44.3),
        ('mask_rcnn/mask-rcnn_r101_ela_fpn_1x_coco.py', 63.54, 63.5),
    ],
)
def test_trainable_parameters_of_detectors(config, light, ela, config_dir):
    cfg = Config.fromfile(config_dir / config)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # MRLA-light has one parameter per channel more, lambda_o; stage 1 is
    # frozen.
    lambdas = sum(
        block.layer_attn.channels
        for stage in range(2, 5)
        for block in getattr(model.backbone, f'layer{stage}')
    )
    assert round((count + lambdas) / 1e6, 2) == light
    assert round(count / 1e6, 1) == ela
