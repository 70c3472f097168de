import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmela.layers import KCLA, AttentionState
from tests.helpers.stages import BlockStage

C, D = 16, 4
G = C // D


def make_stage(n=3, channels=C, before=None, **kwargs):
    """A stage of convolutions, the first of stride 2 after another stage."""
    crossing = {}
    last = channels
    if before is not None:
        last = before[-1].out_channels
        crossing = dict(previous_channels=last, stride=2)
    stage = BlockStage(
        *[
            nn.Conv2d(
                last if i == 0 else channels,
                channels,
                3,
                2 if crossing and i == 0 else 1,
                1,
            )
            for i in range(n)
        ],
        before=before if kwargs.get('cross_stage', True) else None,
    )
    for i in range(n):
        stage.attach(
            i,
            KCLA(
                channels,
                head_dim=D,
                **{**dict(drop_path=0), **kwargs, **(crossing if i == 0 else {})},
            ),
        )
    return stage


def naive_weight(attention, key, g):
    """Weight of a token in head g, as eq. 10 has it."""
    heads = attention.num_heads
    t = attention.test_temperature
    s = t ** (1 - 2 * g / (heads - 1)) if heads > 1 else t
    norm = math.sqrt(sum(float(v) ** 2 for v in key)) * s
    return math.exp(min(norm, 10)) if attention.exp_norm else norm


def naive(stages, x):
    """KCLA with the sums of eq. 10 and 11, head by head."""
    u = z = None
    for stage in stages:
        direction = 0
        for i, block in enumerate(stage):
            x = block.forward(x)  # without its hooks
            a = block.layer_attn
            if not a.active:
                continue
            if i and not a.accumulate:
                u = z = None
            if i == 0 and hasattr(a, 'cross_stage') and u is not None:
                m = u / z.repeat_interleave(D, 1)[..., None, None]
                m = a.cross_stage.reduce(m)
                norm = a.cross_stage.norm
                m = F.batch_norm(m, None, None, norm.weight, norm.bias, True)
                k = F.conv1d(
                    m.mean((2, 3))[:, None], a.cross_stage.key.weight, padding='same'
                )[:, 0]
                z = torch.tensor(
                    [
                        [
                            naive_weight(a, k[b, g * D : (g + 1) * D], g)
                            for g in range(a.num_heads)
                        ]
                        for b in range(len(x))
                    ]
                )
                u = m * z.repeat_interleave(D, 1)[..., None, None]
            elif i == 0:
                u = z = None
            y = x.mean((2, 3))[:, None]
            q = F.conv1d(y, a.query.weight, padding='same')[:, 0]
            k = F.conv1d(y, a.key.weight, padding='same')[:, 0]
            direction = direction + k if a.direction == 'sum' else k
            w = torch.zeros(len(x), a.num_heads)
            e = torch.zeros(len(x), a.num_heads)
            for b in range(len(x)):
                for g in range(a.num_heads):
                    head = slice(g * D, (g + 1) * D)
                    w[b, g] = naive_weight(a, k[b, head], g)
                    along = direction[b, head]
                    e[b, g] = q[b, head].dot(along) / along.norm()
            token = a.value(x) if a.recurrent else x
            wx = token * w.repeat_interleave(D, 1)[..., None, None]
            u = wx if u is None else u + wx
            z = w if z is None else z + w
            out = u / (z + a.eps).repeat_interleave(D, 1)[..., None, None]
            if not a.recurrent:
                out = a.value(out)
            if a.head_attention_type == 'linear':
                e = F.linear(e, a.head_attention.weight)
            if a.head_attention_type != 'none':
                out = out * e.sigmoid().repeat_interleave(D, 1)[..., None, None]
            out = F.batch_norm(out, None, None, a.norm.weight, a.norm.bias, True)
            x = x + F.relu(out)
    return x


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(temperature=1),
        dict(exp_norm=False),
        dict(head_attention='none'),
        dict(head_attention='plain'),
        dict(recurrent=True),
        dict(cross_stage=False),
        dict(temperature=1 / 0.7, direction='sum'),
        dict(eps=0.5, cross_stage_groups=False),
        dict(accumulate=False),
    ],
    ids=str,
)
def test_equals_naive_loops(kwargs):
    torch.manual_seed(0)
    first = make_stage(3, **kwargs)
    stages = [first, make_stage(2, 2 * C, before=first, **kwargs)]
    for stage in stages:
        for attention in stage.attentions:
            attention.test_temperature = kwargs.get('temperature', 0.7)
            nn.init.normal_(attention.key.weight, std=3)
            nn.init.normal_(attention.query.weight, std=3)
    stages[0][1].layer_attn.attention_state = AttentionState.PRUNED
    x = torch.randn(2, C, 7, 9)
    with torch.no_grad():
        out = stages[1](stages[0](x))
        torch.testing.assert_close(out, naive(stages, x), rtol=1e-4, atol=1e-5)


def test_key_norms_are_capped():
    """exp(10) at most, so that a mean in half precision stays finite."""
    torch.manual_seed(0)
    stage = make_stage(3)
    for attention in stage.attentions:
        nn.init.constant_(attention.key.weight, 1e4)
    x = torch.randn(2, C, 4, 4)
    try:
        autocast = torch.autocast('cpu', dtype=torch.float16)
        with autocast:
            torch.ones(1, 1) @ torch.ones(1, 1)
    except RuntimeError as error:
        pytest.skip(f'torch {torch.__version__}: {error}')
    with autocast:
        assert stage(x).isfinite().all()


def test_gradients_reach_all_parameters():
    torch.manual_seed(0)
    first = make_stage()
    second = make_stage(before=first)
    out = second(first(torch.randn(2, C, 8, 8)))
    out.square().sum().backward()
    for stage in (first, second):
        for name, param in stage.named_parameters():
            assert param.grad is not None, name
            # The first block of all has nothing to weigh itself against but
            # the small constant of eq. 11.
            assert param.grad.abs().sum() > 0, name


def test_the_stage_before_must_run_before():
    first = make_stage()
    second = make_stage(before=first)
    x = torch.randn(2, C, 8, 8)
    with pytest.raises(RuntimeError, match='which does not exist'):
        second(x)
    second(first(x))
    with pytest.raises(RuntimeError, match='which does not exist'):
        second(x)


def test_lost_gradient_is_an_error():
    first = make_stage()
    second = make_stage(before=first)
    x = torch.randn(2, C, 8, 8, requires_grad=True)
    x = torch.utils.checkpoint.checkpoint(first, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match='which has no gradient'):
        second(x)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(head_attention='mean'), "head_attention='mean' is unknown"),
        (dict(temperature=0), r'temperature=0 is not a number in \(0, inf\)'),
        (dict(direction='mean'), "direction='mean' is unknown.*'own', 'sum'"),
        (dict(eps=-1), r'eps=-1 is not a number in \[0, inf\)'),
        (dict(previous_channels=6), 'the 4 heads .* the 6 channels'),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        KCLA(C, head_dim=D, **kwargs)


def test_restart():
    """A block that goes on with the normalized mean as one token."""
    first = KCLA(16, head_dim=8, drop_path=0.0).double().eval()
    again = KCLA(16, head_dim=8, drop_path=0.0, restart_blocks=(1,), block=1)
    again.double().eval()
    assert 'relu=False' not in again.fingerprint()
    x, y = torch.randn(2, 2, 16, 5, 5, dtype=torch.double)
    memory = KCLA.Memory()
    with torch.no_grad():
        first(x, memory)
        mean = again.cross_stage.norm(memory.mean)
        again(y, memory)
        key = again.cross_stage.key(mean.mean((2, 3)).unsqueeze(1)).view(2, 2, 8)
        old = (key.norm(dim=-1) * again.scales).clamp(max=10).exp()
        key = again.key(y.mean((2, 3)).unsqueeze(1)).view(2, 2, 8)
        new = (key.norm(dim=-1) * again.scales).clamp(max=10).exp()
        old, new = (w.repeat_interleave(8, 1)[..., None, None] for w in (old, new))
        expected = (old * mean + new * y) / (old + new)
    torch.testing.assert_close(memory.mean, expected)
    assert not hasattr(KCLA(16, head_dim=8, restart_blocks=(1,)), 'cross_stage')


def test_without_relu():
    with_relu, without = (KCLA(16, head_dim=8, relu=relu) for relu in (True, False))
    without.load_state_dict(
        {k: v for k, v in with_relu.state_dict().items() if k != 'signature'},
        strict=False,
    )
    x = torch.randn(2, 16, 5, 5)
    outs = []
    for attention in (with_relu.eval(), without.eval()):
        outs.append(attention(x, KCLA.Memory()))
    assert (outs[1] < 0).any()
    torch.testing.assert_close(outs[0], outs[1].relu())
    with pytest.raises(RuntimeError, match='relu=False'):
        without.load_state_dict(with_relu.state_dict())


def test_shared_key():
    """One convolution where two would have the same weights, and it trains as one."""
    shared = KCLA(C, D, previous_channels=C, shared_key=True).eval()
    own = KCLA(C, D, previous_channels=C).eval()
    assert shared.fingerprint().endswith(', shared_key=True)')
    with pytest.raises(RuntimeError, match='shared_key=True'):
        own.load_state_dict(shared.state_dict())
    own.load_state_dict(
        {k: v for k, v in shared.state_dict().items() if k != 'signature'}
    )
    x, mean = torch.randn(2, C, 4, 4), torch.randn(2, C, 4, 4)
    gradients = []
    for attention in (shared, own):
        before = KCLA.Memory(mean=mean, mass=torch.ones(2, G))
        attention(x, KCLA.Memory(before=before)).square().sum().backward()
        gradients.append(attention.key.weight.grad)
    assert own.cross_stage.key.weight.grad.abs().max() > 1e-4
    torch.testing.assert_close(
        gradients[0], gradients[1] + own.cross_stage.key.weight.grad
    )
    count = sum(p.numel() for p in shared.parameters())
    assert count == sum(p.numel() for p in own.parameters()) - own.key.weight.numel()
