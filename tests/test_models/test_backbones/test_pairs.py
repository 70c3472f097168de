"""Every layer attention on every backbone."""

import copy
import itertools

import pytest
import torch
from mmengine.config import Config

from mmela.convert.slim import slim_config, slim_state_dict
from mmela.hooks import NetworkKLMeter
from mmela.layers import AttentionState, LayerAttention
from mmela.pruning import FixedCount
from mmela.structure import attention_stages, layer_attentions, prune
from tests.helpers.backbones import ATTENTIONS, MMDET, MMPRETRAIN, build, registry
from tests.helpers.zoo import stir

PAIRS = [
    pytest.param(scope, backbone, attention, id=f'{scope}-{backbone}-{name}')
    for scope, backbones in (('mmpretrain', MMPRETRAIN), ('mmdet', MMDET))
    for backbone, (name, attention) in itertools.product(backbones, ATTENTIONS.items())
]


@pytest.mark.parametrize('scope, backbone, attention', PAIRS)
def test_pair(scope, backbone, attention):
    model = stir(build(scope, backbone, attention))
    attentions = [m for m in model.modules() if isinstance(m, LayerAttention)]
    assert len(attentions) >= 6
    model.train()

    # Forward at an odd size, backward with a gradient in every parameter
    size = (64, 64) if backbone == 'ELAVisionTransformer' else (65, 97)
    x = torch.randn(2, 3, *size)
    outs = model(x)
    expected = model.out_indices
    assert len(outs) == len(expected)
    assert all(o.size(0) == 2 and o.isfinite().all() for o in outs)
    # Parameters after the last output take no part
    last = max(expected)
    sum(o.square().mean() for o in outs).backward()
    used = [
        (name, param)
        for name, param in model.named_parameters()
        if param.requires_grad and not _is_after(name, model, last)
    ]
    for name, param in used:
        assert param.grad is not None, name
    active = [p for n, p in used if 'layer_attn' in n]
    assert active

    # State dict round trip into a network with other weights
    other = build(scope, backbone, attention)
    for param in other.parameters():
        torch.nn.init.normal_(param)
    other.load_state_dict(model.state_dict(), strict=True)
    model.eval()
    other.eval()
    with torch.no_grad():
        outs, again = model(x), other(x)
        for out, o in zip(outs, again):
            assert torch.equal(out, o)

        # A copy, as EMA makes one, is on its own
        clone = copy.deepcopy(model)
        for param in clone.parameters():
            param.zero_()
        for out, o in zip(outs, model(x)):
            assert torch.equal(out, o)

        # Batch of 1: in eval mode samples do not see each other
        for out, o in zip(outs, model(x[:1])):
            torch.testing.assert_close(out[:1], o, rtol=1e-3, atol=1e-4)

        # Half precision
        with torch.autocast('cpu', dtype=torch.bfloat16):
            for out in model(x):
                assert out.isfinite().all()
        half = copy.deepcopy(model).bfloat16()
        for o in half(x.bfloat16()):
            assert o.dtype == torch.bfloat16 and o.isfinite().all()

        # The attentions matter, and pruned ones are gone
        for a in attentions:
            a.attention_state = AttentionState.PRUNED
        plain = model(x)
        assert not torch.equal(plain[-1], outs[-1])
        for a in attentions:
            for param in a.parameters():
                param.fill_(float('nan'))
        for out, o in zip(plain, model(x)):
            assert torch.equal(out, o)


def _is_after(name, model, last):
    """Whether a parameter comes after the last returned stage."""
    layers = getattr(model, 'res_layers', None)
    if layers is None:
        return False
    return name.split('.')[0] in layers[last + 1 :]


@pytest.mark.parametrize(
    'scope, backbone',
    [
        (scope, backbone)
        for scope, backbones in (('mmpretrain', MMPRETRAIN), ('mmdet', MMDET))
        for backbone in backbones
    ],
)
def test_keys_of_the_toolbox_backbone(scope, backbone):
    """All keys but those of attentions are those of the toolbox's class."""
    model = build(scope, backbone, ATTENTIONS['MRLABase'])
    kwargs = copy.deepcopy(
        dict(MMPRETRAIN if scope == 'mmpretrain' else MMDET)[backbone]
    )
    kwargs.pop('head_dim')
    kwargs.pop('layers_per_stage', None)
    plain = registry(scope).build(dict(type=backbone[len('ELA') :], **kwargs))
    own = {k for k in model.state_dict() if 'layer_attn' not in k}
    assert own == set(plain.state_dict())


def test_four_layers_of_a_transformer_form_a_stage():
    registry('mmpretrain')
    model = registry('mmpretrain').build(
        dict(
            type='ELAVisionTransformer',
            arch='deit-tiny',
            layer_attention=dict(type='MRLABase', head_dim=16),
        )
    )
    stages = attention_stages(model)
    assert [len(s.attentions) for s in stages.values()] == [4, 4, 4]
    assert model.layers[0].layer_attn.num_heads == 12


def test_stages_of_efficientnet():
    """B0 has 1, 1, 2, 2 and 3 residual blocks of 24 to 192 channels."""
    model = registry('mmpretrain').build(
        dict(
            type='ELAEfficientNet',
            arch='b0',
            drop_path_rate=0.2,
            layer_attention=dict(type='MRLABase', head_dim=8),
        )
    )
    stages = attention_stages(model).values()
    assert [[a.channels for a in s.attentions] for s in stages] == [
        [24],
        [40],
        [80] * 2,
        [112] * 2,
        [192] * 3,
    ]
    # The attention shares the probability of its block's stochastic depth
    for stage in stages:
        for block in stage.blocks.values():
            rate = block.layer_attn.drop_path.drop_prob
            assert rate == block.drop_path.drop_prob > 0


def test_frozen_blocks_freeze_their_attention():
    model = registry('mmpretrain').build(
        dict(
            type='ELAEfficientNet',
            arch='b0',
            frozen_stages=3,
            layer_attention=dict(type='MRLABase', head_dim=8),
        )
    )
    model.train()
    stages = list(attention_stages(model).values())
    frozen = [
        not any(p.requires_grad for p in s.attentions[0].parameters()) for s in stages
    ]
    assert frozen == [True, False, False, False, False]
    assert not stages[0].attentions[0].training


@pytest.mark.parametrize(
    'scope, backbone',
    [
        ('mmpretrain', 'ELAVisionTransformer'),
        ('mmpretrain', 'ELAEfficientNet'),
        ('mmdet', 'ELAPyramidVisionTransformerV2'),
    ],
)
def test_all_is_trained_where_nothing_is_frozen(scope, backbone):
    model = build(scope, backbone, ATTENTIONS['MRLABase'])
    model.train()
    assert not [n for n, p in model.named_parameters() if not p.requires_grad]


def test_init_weights_keeps_zero_init():
    """The backbone's own sets every norm weight to 1."""
    model = build(
        'mmpretrain', 'ELAEfficientNet', dict(ATTENTIONS['MRLABase'], zero_init=True)
    )
    model.init_weights()
    attentions = layer_attentions(model).values()
    assert attentions
    for attention in attentions:
        assert (attention.norm.weight == 0).all()


def test_tokens_against_their_equations():
    """MRLA-light in a transformer (MRLA, algorithm 4), token by token."""
    model = build('mmpretrain', 'ELAVisionTransformer', ATTENTIONS['MRLALight'])
    model.eval()  # which returns None
    seen = {}
    block = model.layers[0]
    block.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].clone()))
    model.layers[1].register_forward_pre_hook(
        lambda m, args: seen.update(out=args[0].clone())
    )
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        x = seen['x']
        y = x + block.attn(block.ln1(x))
        y = block.ffn(block.ln2(y), identity=y)
        a = block.layer_attn
        normed, before = a.pre_norm(y)[0], a.identity_norm(x)[0]
        grid = normed[1:].T.reshape(32, 4, 4)
        value = torch.nn.functional.gelu(a.value(grid[None]))[0]
        pooled = grid.mean((1, 2))[None, None]
        q, k = a.query(pooled)[0, 0], a.key(pooled)[0, 0]
        expected = y[0].clone()
        expected[0] += normed[0]  # the class token stays apart
        for g in range(2):
            head = slice(16 * g, 16 * (g + 1))
            gate = torch.sigmoid(q[head].dot(k[head]) / 4)
            patches = (gate * value[head]).flatten(1).T
            expected[1:, head] += patches + a.lambda_o[head] * before[1:, head]
        torch.testing.assert_close(seen['out'][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'backbone', ['ELAResNet', 'ELARegNet', 'ELAEfficientNet', 'ELAVisionTransformer']
)
def test_measure_prune_and_slim(backbone):
    """What the hook does and what comes after, on every kind of backbone."""
    model = build('mmpretrain', backbone, ATTENTIONS['MRLABase'])
    model.eval()  # which returns None for a ResNet
    whole = torch.nn.ModuleDict(dict(backbone=model))
    stages = attention_stages(whole)
    meter = NetworkKLMeter(stages, 'mean_kl', 1e-8)
    meter.attach()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    meter.detach()
    decision = meter.decide(FixedCount(count=2))
    assert [(x.name, x.stage) for x in decision.layers] == [
        (n, k) for k, s in stages.items() for n in s.named
    ]
    pruned = decision.pruned
    assert len(pruned) == 2
    prune(whole, pruned)
    with torch.no_grad():
        expected = model(x)

    state, blocks = slim_state_dict(whole)
    kwargs = copy.deepcopy(MMPRETRAIN[backbone])
    cfg = Config(dict(model=dict(backbone=dict(type=backbone, **kwargs))))
    cfg.model.backbone.layer_attention = dict(
        type='MRLABase', head_dim=cfg.model.backbone.pop('head_dim')
    )
    slim = registry('mmpretrain').build(slim_config(cfg, blocks).model.backbone)
    slim.eval()
    slim.load_state_dict(
        {k[len('backbone.') :]: v for k, v in state.items()}, strict=True
    )
    assert (
        sum(isinstance(m, LayerAttention) for m in slim.modules())
        == sum(len(s.attentions) for s in stages.values()) - 2
    )
    with torch.no_grad():
        for out, e in zip(slim(x), expected):
            assert torch.equal(out, e)
