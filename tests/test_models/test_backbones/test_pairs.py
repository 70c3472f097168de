"""Every layer attention on every backbone."""

import copy

import pytest
import torch

from mmela.layers import AttentionState, LayerAttention
from mmela.structure import attention_stages, layer_attentions
from tests.helpers.backbones import FITTING, OTHERS, build, build_in
from tests.helpers.zoo import ATTENTIONS, PAPERS, stir

HEADS_OF_16 = dict(type='MRLABase', head_dim=16)
# Those of the papers everywhere, and the others where blocks differ most
DIFFERENT = [('mmpretrain', 'SEResNet'), ('mmdet', 'Res2Net'), ('mmdet', 'RegNet')]
PAIRS = [
    case
    for case in FITTING
    if case.values[2] in PAPERS
    or case.values[:2] in DIFFERENT
    # One grows beyond all bounds untrained, one takes the place of a convolution
    and case.values[2] not in ('linear', 'AA')
]


@pytest.mark.parametrize('scope, name, attention', PAIRS)
def test_pair(scope, name, attention):
    """Forward, backward, features, state dict, copies, half precision, pruning."""
    model = stir(build(scope, name, ATTENTIONS[attention]))
    attentions = [m for m in model.modules() if isinstance(m, LayerAttention)]
    assert len(attentions) >= 6
    model.train()

    # Forward at an odd size, backward with a gradient in every parameter
    size = (64, 64) if name == 'VisionTransformer' else (65, 97)
    x = torch.randn(2, 3, *size)
    outs = model(x)
    expected = model.out_indices
    stem = name == 'UNetResNet'  # which returns what comes before the stages too
    assert len(outs) == len(expected) + stem
    assert all(o.size(0) == 2 and o.isfinite().all() for o in outs)
    # Parameters after the last output take no part
    last = max(expected)
    sum(o.square().mean() for o in outs).backward()
    used = [
        (key, param)
        for key, param in model.named_parameters()
        if param.requires_grad and not _is_after(key, model, last)
    ]
    # In a stage of one block nothing was stored that DLABase could retrieve
    stages = attention_stages(model).values()
    alone = tuple(n for s in stages if len(s.named) == 1 for n in s.named)
    for key, param in used:
        idle = attention == 'DLABase' and key.startswith(alone)
        assert idle or param.grad.isfinite().all(), key
    assert any('layer_attn' in key for key, _ in used)

    # State dict round trip into a network with other weights
    other = build(scope, name, ATTENTIONS[attention])
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


def test_four_layers_of_a_transformer_form_a_stage():
    cfg = dict(type='ELAVisionTransformer', arch='deit-tiny')
    model = build_in('mmpretrain', dict(cfg, layer_attention=HEADS_OF_16))
    stages = attention_stages(model)
    assert [len(s.attentions) for s in stages.values()] == [4, 4, 4]
    assert model.layers[0].layer_attn.num_heads == 12


def test_stages_of_efficientnet():
    """B0 has 1, 1, 2, 2 and 3 residual blocks of 24 to 192 channels."""
    model = build('mmpretrain', 'EfficientNet', ATTENTIONS['MRLABase'])
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
    attention = ATTENTIONS['MRLABase']
    model = build('mmpretrain', 'EfficientNet', attention, frozen_stages=3)
    model.train()
    stages = list(attention_stages(model).values())
    frozen = [
        not any(p.requires_grad for p in s.attentions[0].parameters()) for s in stages
    ]
    assert frozen == [True, False, False, False, False]
    assert not stages[0].attentions[0].training


@pytest.mark.parametrize('scope, name', OTHERS)
def test_all_is_trained_where_nothing_is_frozen(scope, name):
    model = build(scope, name, ATTENTIONS['MRLABase'])
    model.train()
    assert not [n for n, p in model.named_parameters() if not p.requires_grad]


def test_init_weights_keeps_zero_init():
    """The backbone's own sets every norm weight to 1."""
    attention = dict(ATTENTIONS['MRLABase'], zero_init=True)
    model = build('mmpretrain', 'EfficientNet', attention)
    model.init_weights()
    attentions = layer_attentions(model).values()
    assert attentions
    for attention in attentions:
        assert (attention.norm.weight == 0).all()


def test_tokens_against_their_equations():
    """MRLA-light in a transformer (MRLA, algorithm 4), token by token."""
    model = build(
        'mmpretrain', 'VisionTransformer', dict(HEADS_OF_16, type='MRLALight')
    )
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
