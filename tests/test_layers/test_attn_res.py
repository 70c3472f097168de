"""Attention residuals against loops written from the definition, and their start."""

import copy
import itertools

import pytest
import torch
from torch import nn

from mmela.hooks import KLMeter
from mmela.layers import AttentionState, AttnRes, MRLABase
from mmela.layers.features import Features
from mmela.pruning import deviation
from mmela.structure import attention_stages
from tests.helpers.runs import padded_kl
from tests.helpers.stages import BlockStage

C, DEPTH = 8, 6
ACTIVE, VALUE_ONLY, PRUNED = AttentionState


class Block(nn.Module):
    def __init__(self, channels=C):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


def make_stage(depth=DEPTH, query=1.0, **kwargs):
    """A stage in double precision, with queries as after some training."""
    torch.manual_seed(0)
    stage = BlockStage(*[Block() for _ in range(depth)])
    for index in range(depth):
        stage.attach(index, AttnRes(C, block=index, **kwargs))
    for attention in stage.attentions[1:]:
        nn.init.normal_(attention.query, std=query)
        if attention.norm_weight is not None:
            nn.init.uniform_(attention.norm_weight, 0.5, 2)
    return stage.double()


def blocks_of(stage):
    """Its blocks, as a network without attention."""
    plain = nn.Sequential(*(Block() for _ in stage)).to(next(stage.parameters()))
    for block, other in zip(plain, stage):
        block.conv.load_state_dict(other.conv.state_dict())
    return plain


def image(*shape, dtype=torch.double):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, C, 2, 3)), generator=generator, dtype=dtype)


def naive(blocks, attentions, x, per, heads, total, every):
    """Output and, for each attention, its distributions (B, G, P, t).

    Sample by sample, position by position and head by head.
    """
    tokens, groups, found = [], [], []
    passed_on, waiting = x, 0.0
    for index, (block, attention) in enumerate(zip(blocks, attentions)):
        out = block(passed_on)
        waiting = waiting + (out - passed_on if tokens or index else out)
        group = 0 if index == 0 else 1 + (index - 1) // every
        state = attention.attention_state
        if state == PRUNED or state == VALUE_ONLY and groups[-1:] == [group]:
            passed_on = out
            continue
        if groups[-1:] == [group]:
            tokens[-1] = tokens[-1] + waiting
        else:
            tokens.append(waiting), groups.append(group)
        waiting = 0.0
        if state == VALUE_ONLY:
            passed_on = out
            continue
        retrieved = torch.zeros_like(out)
        distributions = []
        for b, h, i, j in itertools.product(
            *map(range, (len(out), heads, *out.shape[2:]))
        ):
            part = slice(h * C // heads, (h + 1) * C // heads)
            logits = []
            for token in tokens:
                key = token[b, :, i, j] if per == 'position' else token[b].mean((1, 2))
                key = key / (key.square().mean() + 1e-6).sqrt()
                query = torch.zeros_like(key)
                if attention.query is not None:
                    query = attention.query
                if attention.norm_weight is not None:
                    query = query * attention.norm_weight
                logits.append((query[part] * key[part]).sum())
            weights = torch.stack(logits).softmax(0)
            distributions.append(weights.detach())
            number = len(tokens) if total == 'sum' else 1
            for weight, token in zip(weights, tokens):
                retrieved[b, part, i, j] += number * weight * token[b, part, i, j]
        shape = (len(out), heads, -1, len(tokens))
        found.append(torch.stack(distributions).view(shape))
        passed_on = retrieved
    return passed_on, found


STATES = {
    'all': (0,) * DEPTH,
    'pruned': (0, 0, 2, 0, 2, 0),
    'first pruned': (2, 0, 0, 2, 2, 0),
    'values': (0, 1, 0, 1, 1, 0),
    'mixed': (0, 2, 1, 0, 1, 2),
}


def set_states(stage, name):
    for attention, state in zip(stage.attentions, STATES[name]):
        attention.attention_state = AttentionState(state)


@pytest.mark.parametrize('states', STATES)
@pytest.mark.parametrize('every', [1, 2])
@pytest.mark.parametrize('total', ['mean', 'sum'])
@pytest.mark.parametrize('heads', [1, 4])
@pytest.mark.parametrize('per', ['position', 'image'])
def test_equals_naive_loops(per, heads, total, every, states):
    """Forward and backward."""
    how = dict(per=per, heads=heads, total=total, every=every)
    stage = make_stage(norm_weight=heads == 4, **how)
    set_states(stage, states)
    seen = []
    stage.observer = seen.extend
    x = image().requires_grad_()
    expected, distributions = naive(blocks_of(stage), stage.attentions, x, **how)
    out = stage(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert len(seen) == len(distributions)
    for scores, distribution in zip(seen, distributions):
        if per == 'image':  # one for all positions
            scores = scores[:, :, None].expand_as(distribution)
        torch.testing.assert_close(scores.softmax(-1), distribution)
    # The loops have the weights of the attentions, but blocks of their own
    plain = blocks_of(stage)
    attentions = [p for a in stage.attentions for p in a.parameters()]
    trained = [p for p in attentions if p.requires_grad]
    mine = torch.autograd.grad(
        stage(x).square().sum(),
        [x, *(b.conv.weight for b in stage), *trained],
        allow_unused=True,
    )
    again, _ = naive(plain, stage.attentions, x, **how)
    theirs = torch.autograd.grad(
        again.square().sum(),
        [x, *(b.conv.weight for b in plain), *trained],
        allow_unused=True,
    )
    for one, other in zip(mine, theirs):
        # The first active one has a single token, and so no gradient but 0
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('depth', [2, 6, 40])
@pytest.mark.parametrize('dtype', [torch.float, torch.double, torch.bfloat16])
@pytest.mark.parametrize('every', [1, 3])
@pytest.mark.parametrize('per', ['position', 'image'])
def test_a_sum_starts_as_the_plain_network_bit_by_bit(per, every, dtype, depth):
    stage = make_stage(depth, query=0.0, per=per, every=every, heads=2, total='sum')
    stage.to(dtype)
    plain = blocks_of(stage)
    x = image(dtype=dtype)
    assert torch.equal(stage(x), plain(x))
    stage(x).float().square().mean().backward()
    plain(x).float().square().mean().backward()
    for attention in stage.attentions[1:]:
        assert attention.query.grad.abs().max() > 0
    if dtype == torch.double:  # and so does the gradient
        for block, other in zip(stage, plain):
            torch.testing.assert_close(block.conv.weight.grad, other.conv.weight.grad)


def test_a_deep_sum_starts_as_the_plain_network_within_rounding():
    """From 41 tokens on, n times a softmax of 1 / n need not be 1."""
    stage = make_stage(60, query=0.0, total='sum').float()
    plain = blocks_of(stage)
    x = image(dtype=torch.float)
    torch.testing.assert_close(stage(x), plain(x), rtol=1e-6, atol=60 * 2**-22)


def test_a_mean_starts_as_the_mean_of_what_blocks_add():
    stage = make_stage(3, query=0.0)
    x = image()
    first = stage[0].conv(x).tanh() + x
    second = stage[1].conv(first).tanh()
    mean = (first + second) / 2
    third = stage[2].conv(mean).tanh()
    torch.testing.assert_close(stage(x), (first + second + third) / 3)


@pytest.mark.parametrize('total', ['mean', 'sum'])
def test_all_pruned_is_the_plain_network(total):
    stage = make_stage(total=total)
    for attention in stage.attentions:
        attention.attention_state = PRUNED
    assert torch.equal(stage(image()), blocks_of(stage)(image()))


def test_one_that_is_pruned_passes_on_what_its_block_returns():
    stage = make_stage(total='sum')
    stage.attentions[2].attention_state = PRUNED
    seen = []
    stage[2].register_forward_hook(
        lambda module, args, output: seen.extend([args[0], output])
    )
    stage(image())
    assert torch.equal(seen[1], blocks_of(stage)[2](seen[0]))


class PointwiseBlock(nn.Module):
    """Treats all positions alike, in whatever layout."""

    def __init__(self, layout):
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.layout = layout

    def forward(self, x):
        if self.layout == 'BCHW':
            return x + self.fc(x.movedim(1, -1)).tanh().movedim(-1, 1)
        return x + self.fc(x).tanh()


@pytest.mark.parametrize('per', ['position', 'image'])
def test_class_tokens_are_attended_over_as_all_tokens(per):
    """Whose number and size of map are of no account."""
    stages = {}
    for layout in ('BLC', 'BCHW', 'BHWC'):
        torch.manual_seed(0)
        stage = BlockStage(*[PointwiseBlock(layout) for _ in range(4)])
        for index in range(4):
            attention = AttnRes(C, per=per, heads=2, total='sum', block=index)
            stage.attach(index, attention)
            place = attention.place
            features = Features(layout, extra=2 * (layout == 'BLC'))
            attention.place = type(place)(**{**vars(place), 'features': features})
            if index:
                nn.init.normal_(attention.query)
        stages[layout] = stage.double()
    tokens = image(2, 7, C)
    out = stages['BLC'](tokens)
    column = tokens.movedim(-1, 1)[..., None]
    torch.testing.assert_close(out.movedim(-1, 1)[..., None], stages['BCHW'](column))
    torch.testing.assert_close(out[:, :, None], stages['BHWC'](tokens[:, :, None]))


@pytest.mark.parametrize('total', ['mean', 'sum'])
def test_stochastic_depth_leaves_samples_as_their_blocks_have_them(total):
    stage = make_stage(total=total, drop_path=0.4).train()
    x = image(8, C, 3, 4)
    kept = [[] for _ in stage]
    for index, block in enumerate(stage):

        def note(module, args, output, index=index):
            plain = blocks_of(stage)[index](args[0])
            same = [torch.equal(a, b) for a, b in zip(plain, output)]
            kept[index] = [not one for one in same]

        block.register_forward_hook(note)
    memories = []
    stage[-1].layer_attn.register_forward_hook(
        lambda module, args, output: memories.append(args[1])
    )
    torch.manual_seed(0)
    out = stage(x)
    assert not any(kept[0])  # has nothing to drop
    shares = [sum(samples) / 8 for samples in kept[1:]]
    assert 0.2 < sum(shares) / len(shares) < 0.95 and min(shares) < 1
    # The later attentions know how much of each token is in what they got
    (memory,) = memories
    weights = memory.weights
    rebuilt = sum(w * t for w, t in zip(weights, memory.tokens))
    torch.testing.assert_close(rebuilt, out)
    # A sample that no attention has dropped has what it has in evaluation
    assert (weights >= 0).all()
    expected = make_stage(total=total).eval()(x)
    same = [torch.equal(a, b) for a, b in zip(out, expected)]
    assert same == [all(samples) for samples in zip(*kept[1:])]
    stage.eval()
    whole = make_stage(total=total).eval()
    assert torch.equal(stage(x), whole(x))


def test_autocast():
    """Scores and weights stay in single precision, features as they are."""
    stage = make_stage(total='sum').float()
    seen = []
    stage.observer = seen.extend
    x = image(dtype=torch.float)
    with torch.autocast('cpu', torch.bfloat16):
        out = stage(x)
    assert {scores.dtype for scores in seen} == {torch.float}
    torch.testing.assert_close(out.float(), stage(x), rtol=0.1, atol=0.1)
    half = stage.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_what_others_write_into_an_output_is_no_part_of_a_token():
    stage, twin = make_stage(), make_stage()
    for each, change in ((stage, lambda y: y.mul_(0.5)), (twin, lambda y: y * 0.5)):
        for block in each:
            block.register_forward_hook(lambda m, a, out, change=change: change(out))
    torch.testing.assert_close(stage(image()), twin(image()))
    with torch.inference_mode():
        torch.testing.assert_close(stage(image()), twin(image()))


def test_parameters_and_fingerprint():
    first, later = AttnRes(C, block=0), AttnRes(C, norm_weight=True)
    assert not list(first.parameters())
    assert {k: p.shape for k, p in later.named_parameters()} == dict(
        query=(C,), norm_weight=(C,)
    )
    assert torch.equal(later.query, torch.zeros(C))
    assert first.movement() is None and later.prunable
    nn.init.normal_(later.query), nn.init.normal_(later.norm_weight)
    later.reset_parameters()
    assert not later.query.any() and (later.norm_weight == 1).all()
    fingerprint = 'AttnRes(per=position, heads=1, total=mean, every=1, norm_weight='
    assert first.fingerprint() == fingerprint + 'False)'
    assert later.fingerprint() == fingerprint + 'True)'


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(per='pixel'), "per='pixel' is unknown; allowed are 'position', 'image'"),
        (dict(total='max'), "total='max' is unknown; allowed are 'mean', 'sum'"),
        (dict(heads=3), r'heads=3 does not divide the 8 channels .* \[1, 2, 4, 8\]'),
        (dict(heads=0), 'heads=0 does not divide'),
        (dict(every=0), 'every=0 is not an integer >= 1'),
        (dict(zero_init=True), "zero_init=True needs total='sum'"),
        (dict(drop_path=0.1, every=2), 'drop_path=0.1 needs every=1, got every=2'),
        (dict(drop_path=1.0), r'drop_path=1.0 is not a number in \[0, 1\)'),
        (dict(backend='cuda'), "backend='cuda' is unknown"),
    ],
)
def test_arguments_that_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AttnRes(C, **kwargs)


# -- what is measured -----------------------------------------------------------


def measure(stage, reduction='mean_kl'):
    stages = attention_stages(nn.ModuleDict(dict(layer1=stage)))
    meter = KLMeter(stages['layer1'], reduction)
    stage.observer = meter
    stage(image())
    stage(image(3, C, 5, 2))
    stage.observer = None
    return list(meter.compute().values())


@pytest.mark.parametrize('reduction', ['mean_kl', 'mean_distribution'])
@pytest.mark.parametrize('states', ['all', 'pruned', 'values'])
@pytest.mark.parametrize('per', ['position', 'image'])
def test_divergences(per, states, reduction):
    """Means over samples, heads and positions."""
    stage = make_stage(per=per, heads=2)
    set_states(stage, states)
    found = measure(stage, reduction)
    how = dict(per=per, heads=2, total='mean', every=1)
    parts = [
        naive(blocks_of(stage), stage.attentions, x, **how)[1]
        for x in (image(), image(3, C, 5, 2))
    ]
    if per == 'image':  # each image counts once, whatever its size
        parts = [[p[:, :, :1] for p in part] for part in parts]
    probs = [
        torch.cat([p.flatten(0, 2) for p in pair]).detach().numpy()
        for pair in zip(*parts)
    ]
    if reduction == 'mean_distribution':
        probs = [p.mean(0) for p in probs]
    assert found[0] is None and len(found) == len(probs)
    for divergence, p, q in zip(found[1:], probs, probs[1:]):
        assert divergence.total == pytest.approx(padded_kl(p, q).mean(), rel=1e-6)
        assert divergence.shared == p.shape[-1]
        assert divergence.shared + divergence.more == q.shape[-1]


def test_divergences_within_a_group():
    """Both attend over the same tokens: all is shape, and the baseline is 0."""
    found = measure(make_stage(every=2))
    assert [d.more for d in found[1:]] == [1, 0, 1, 0, 1]
    for divergence in found[1:]:
        if not divergence.more:
            assert divergence.baseline == 0 and divergence.shape > 1e-3
            assert divergence.own == pytest.approx(0, abs=1e-12)
    assert deviation(found) == deviation([d for d in found[1:] if d.more])
    assert deviation([d for d in found[1:] if not d.more]) is None
    untouched = measure(make_stage(every=2, query=0.0))
    assert [d.total for d in untouched[1:]] == pytest.approx(
        [d.baseline for d in untouched[1:]], abs=1e-6
    )


def test_other_attentions_open_a_token_each():
    assert all(MRLABase(C, head_dim=C).opens_token(a) for a in (None, AttnRes(C)))


def test_a_copy_is_of_its_own():
    stage = make_stage()
    twin = copy.deepcopy(stage)
    nn.init.zeros_(twin[1].layer_attn.query)
    assert torch.equal(stage(image()), make_stage()(image()))
    assert not torch.equal(stage(image()), twin(image()))
