import math

import pytest
import torch
import torch.nn.functional as F

from mmela.layers import AttentionState, MRLABase
from tests.helpers.stages import run_one

C, D = 16, 4


def make(n=3, **kwargs):
    torch.manual_seed(0)
    return [MRLABase(C, head_dim=D, **kwargs) for _ in range(n)]


def run(attentions, xs):
    memory = MRLABase.Memory()
    return [run_one(a, x, memory) for a, x in zip(attentions, xs)], memory


def inputs(n=3, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(2, C, 6, 5) for _ in range(n)]


def naive(attentions, xs):
    """MRLA-base for one block at a time, sample by sample and head by head."""
    outs = []
    for t, x_t in enumerate(xs):
        visible = [
            s
            for s in range(t + 1)
            if attentions[s].attention_state != AttentionState.PRUNED
        ]
        if not attentions[t].active:
            outs.append(x_t)
            continue
        o = torch.zeros_like(x_t)
        for b in range(len(x_t)):
            query = F.conv1d(
                x_t[b].mean((1, 2))[None, None],
                attentions[t].query.weight,
                padding='same',
            )[0, 0]
            for g in range(C // D):
                head = slice(g * D, (g + 1) * D)
                logits, values = [], []
                for s in visible:
                    key = F.conv1d(
                        xs[s][b].mean((1, 2))[None, None],
                        attentions[s].key.weight,
                        padding='same',
                    )[0, 0]
                    logits.append(query[head].dot(key[head]) / math.sqrt(D))
                    values.append(
                        F.conv2d(
                            xs[s][b : b + 1],
                            attentions[s].value.weight,
                            padding=1,
                            groups=C,
                        )[0, head]
                    )
                weights = torch.stack(logits).softmax(0)
                o[b, head] = sum(w * v for w, v in zip(weights, values))
        norm = attentions[t].norm
        o = F.batch_norm(o, None, None, norm.weight, norm.bias, True)
        outs.append(x_t + F.relu(o))
    return outs


@pytest.mark.parametrize(
    'states',
    [
        (0, 0, 0, 0),
        (0, 2, 0, 0),
        (0, 1, 0, 2),
        (0, 2, 2, 0),
    ],
)
def test_equals_naive_loops(states):
    attentions, xs = make(4), inputs(4)
    for attention, state in zip(attentions, states):
        # Large scores, so that the attention is far from uniform
        torch.nn.init.normal_(attention.query.weight, std=5)
        torch.nn.init.normal_(attention.norm.weight, 1, 0.3)
        torch.nn.init.normal_(attention.norm.bias, 0, 0.3)
        attention.attention_state = AttentionState(state)
    outs, _ = run(attentions, xs)
    for out, expected in zip(outs, naive(attentions, xs)):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    'states',
    [
        (0, 0, 0, 0),
        (0, 2, 0, 0),
        (0, 1, 0, 2),
    ],
)
def test_gradients_equal_those_of_plain_code(states):
    """Of the whole stage: each output is the next input."""
    grads = []
    for backend in ('auto', 'reference'):
        attentions = [a.double() for a in make(4, backend=backend)]
        for attention, state in zip(attentions, states):
            attention.attention_state = AttentionState(state)
        x = inputs(1)[0].double().requires_grad_()
        memory, out = MRLABase.Memory(), x
        for attention in attentions:
            out = run_one(attention, torch.tanh(out), memory)
        out.square().sum().backward()
        grads.append(
            [x.grad]
            + [p.grad for a in attentions for p in a.parameters() if p.requires_grad]
        )
    for grad, expected in zip(*grads):
        torch.testing.assert_close(grad, expected)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='fast' .*'compile'"):
        MRLABase(C, head_dim=D, backend='fast')


def test_first_block_attends_to_itself_only():
    (attention,), (x,) = make(1), inputs(1)
    out, memory = run([attention], [x])
    assert memory.scores[0].shape == (2, C // D, 1)
    expected = x + F.relu(attention.norm(attention.value(x)))
    torch.testing.assert_close(out[0], expected)


def test_memory_tokens():
    attentions = make(4)
    attentions[1].attention_state = AttentionState.PRUNED
    attentions[2].attention_state = AttentionState.VALUE_ONLY
    _, memory = run(attentions, inputs(4))
    assert len(memory.values) == len(memory.keys) == 3
    assert [s.size(-1) for s in memory.scores] == [1, 3]


def test_gradients_reach_all_parameters():
    attentions = make(3)
    outs, _ = run(attentions, inputs())
    sum(out.square().sum() for out in outs).backward()
    for index, attention in enumerate(attentions):
        for name, param in attention.named_parameters():
            if index == 0 and name == 'query.weight':
                # A softmax over one layer does not depend on the query.
                assert param.grad.abs().sum() == 0
            else:
                assert param.grad.abs().sum() > 0, (index, name)


@pytest.mark.parametrize(
    'kwargs, words',
    [
        (dict(small_init=0.2, zero_init=True), 'small_init=0.2 .* zero_init=True'),
        (dict(small_init=0), r'small_init=0 is not a number in \(0, 1\]'),
        (dict(small_init=1.5), 'small_init=1.5 is not'),
    ],
)
def test_small_init_is_checked(kwargs, words):
    with pytest.raises(ValueError, match=words):
        MRLABase(16, head_dim=4, **kwargs)


@pytest.mark.parametrize(
    'kwargs, start', [(dict(zero_init=True), 0.0), (dict(small_init=0.25), 0.25)]
)
def test_without_a_norm_a_scale_has_the_start(kwargs, start):
    attention = MRLABase(C, head_dim=D, norm_cfg=None, **kwargs)
    torch.testing.assert_close(attention.scale, torch.full((C,), start))
    assert MRLABase(C, head_dim=D, norm_cfg=None).scale is None
    assert MRLABase(C, head_dim=D, **kwargs).scale is None


def test_zero_init_starts_as_identity_and_learns():
    attentions, xs = make(2, zero_init=True), inputs(2)
    for step in range(2):
        outs, _ = run(attentions, xs)
        if step == 0:
            assert all(torch.equal(o, x) for o, x in zip(outs, xs))
        sum(out.square().sum() for out in outs).backward()
        for attention in attentions:
            # The gradient of F.relu at 0 would be 0 here.
            assert attention.norm.weight.grad.abs().sum() > 0
            with torch.no_grad():
                for param in attention.parameters():
                    param -= 1e-3 * param.grad
    assert attentions[1].query.weight.grad.abs().sum() > 0


def test_drop_path_drops_samples_of_the_attention_alone():
    (attention,) = make(1, drop_path=0.5)
    x = torch.randn(64, C, 4, 4)
    torch.manual_seed(0)
    out = run([attention], [x])[0][0]
    dropped = (out == x).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    attention.eval()
    assert not (run([attention], [x])[0][0] == x).flatten(1).all(1).any()


def test_bad_drop_path():
    with pytest.raises(ValueError, match=r'drop_path=1.0 .*\[0, 1\)'):
        MRLABase(C, head_dim=D, drop_path=1.0)


def test_scores_stay_in_single_precision_under_autocast():
    attentions, xs = make(2), inputs(2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs, memory = run(attentions, [x.bfloat16() for x in xs])
    assert all(s.dtype == torch.float32 for s in memory.scores)
    assert all(out.dtype == torch.bfloat16 for out in outs)
