"""Attentions within the blocks, against loops written from the papers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmela.baselines import BA, DIA, Plugin, RLAg
from mmela.layers import AttentionState, DLABase, DLALight
from tests.helpers.stages import BlockStage

C, MID = 16, 8


class Block(nn.Module):
    """A bottleneck that adds in place, as those of the toolboxes do."""

    def __init__(self, channels=C, stride=1, with_cp=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, MID, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(MID)
        self.conv2 = nn.Conv2d(MID, MID, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(MID)
        self.conv3 = nn.Conv2d(MID, C, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(C)
        plain = stride == 1 and channels == C
        self.downsample = None if plain else nn.Conv2d(channels, C, 1, stride)
        self.relu = nn.ReLU(inplace=True)
        self.with_cp = with_cp

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.relu(self.norm2(self.conv2(out)))
        out = self.norm3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def make_stage(attention, n=3, **kwargs):
    torch.manual_seed(0)
    stage = BlockStage(*[Block(stride=1 + (i == 0)) for i in range(n)])
    for i in range(n):
        own = dict(owns_shared=False) if i and attention.shared else {}
        stage.attach(i, attention(C, **kwargs, **own))
    for module in stage.modules():  # no symmetry left that could hide a mistake
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return stage


def parts(block, x, conv1=None):
    """Inner outputs, branch and identity of a block, without its hooks."""
    first = block.conv1.forward(x) if conv1 is None else conv1
    first = F.relu(block.norm1.forward(first))
    second = F.relu(block.norm2.forward(block.conv2.forward(first)))
    branch = block.norm3.forward(block.conv3.forward(second))
    identity = x if block.downsample is None else block.downsample(x)
    return first, second, branch, identity


def cell(bottlenecks, x, h, c, output_gate):
    """One step of the LSTM, sample by sample, gate by gate."""
    hs, cs = [], []
    for b in range(len(x)):
        gates = 0
        for net, value in ((bottlenecks.input, x[b]), (bottlenecks.hidden, h[b])):
            inner = (net[0].weight @ value + net[0].bias).clamp(min=0)
            gates = gates + net[2].weight @ inner + net[2].bias
        size = x.shape[1]
        i, f, g = (gates[k * size : (k + 1) * size] for k in range(3))
        cs.append(torch.sigmoid(f) * c[b] + torch.sigmoid(i) * torch.tanh(g))
        hs.append(torch.sigmoid(cs[-1]))
        if output_gate:
            hs[-1] = torch.sigmoid(gates[3 * size :]) * hs[-1]
    return torch.stack(hs), torch.stack(cs)


def naive_dia(stage, x):
    h = c = torch.zeros(len(x), C)
    for block in stage:
        _, _, branch, identity = parts(block, x)
        shared = stage[0].layer_attn.cell
        h, c = cell(shared, branch.mean((2, 3)), h, c, True)
        x = F.relu(identity + h[:, :, None, None] * branch)
    return x


def naive_ba(stage, x):
    for block in stage:
        first, second, branch, identity = parts(block, x)
        layers = block.layer_attn.layers
        total = 0
        for name, map_ in (('conv2', first), ('conv3', second), ('last', branch)):
            fc, norm = layers[name]
            y = map_.mean((2, 3)) @ fc.weight.T
            total = total + F.batch_norm(y, None, None, norm.weight, norm.bias, True)
        gate = torch.sigmoid(F.relu(total) @ block.layer_attn.out.weight.T)
        x = F.relu(identity + gate[:, :, None, None] * branch)
    return x


def naive_rla(stage, x):
    shared = stage[0].layer_attn
    h = torch.zeros(len(x), shared.hidden, *x.shape[2:])
    for block in stage:
        attention = block.layer_attn
        # One convolution over both, as the paper writes it
        weight = torch.cat([block.conv1.weight, attention.input.weight], 1)
        conv1 = F.conv2d(torch.cat([x, h], 1), weight)
        _, _, branch, identity = parts(block, x, conv1)
        if block.downsample is not None:
            h = F.avg_pool2d(h, 2)
        h = attention.norm(h + F.conv2d(branch, shared.reduce.weight))
        h = F.conv2d(torch.tanh(h), shared.recur.weight, padding=1)
        x = F.relu(identity + branch)
    return x


def mrla_parts(attention, x):
    y = x.mean((2, 3))[:, None]
    q = F.conv1d(y, attention.query.weight, padding='same')[:, 0]
    k = F.conv1d(y, attention.key.weight, padding='same')[:, 0]
    return q, k, attention.value(x)


def naive_dla_light(stage, x):
    d = stage[0].layer_attn.head_dim
    shared = stage[0].layer_attn
    h = c = torch.zeros(len(x), C)
    for block in stage:
        attention = block.layer_attn
        _, _, branch, identity = parts(block, x)
        x = F.relu(branch + identity)
        h, c = cell(shared.dsu, x.mean((2, 3)), h, c, False)
        gate, _ = cell(shared.dsu, identity.mean((2, 3)), h, c, False)
        before = identity * gate[:, :, None, None] + shared.refresh(identity)
        q, k, out = mrla_parts(attention, x)
        scores = (q * k).unflatten(1, (-1, d)).sum(-1) / d**0.5
        out = out * scores.sigmoid().repeat_interleave(d, 1)[..., None, None]
        out = out + attention.lambda_o[:, None, None] * before
        x = x + attention.norm(out)
    return x


def naive_dla_base(stage, x):
    d = stage[0].layer_attn.head_dim
    dsu = stage[0].layer_attn.dsu
    h = c = torch.zeros(len(x), C)
    keys, values = [], []
    for block in stage:
        attention = block.layer_attn
        _, _, branch, identity = parts(block, x)
        x = F.relu(branch + identity)
        h, c = cell(dsu, x.mean((2, 3)), h, c, False)
        for s in range(len(keys)):
            keys[s] = keys[s] * cell(dsu, keys[s], h, c, False)[0]
            gate = cell(dsu, values[s].mean((2, 3)), h, c, False)[0]
            values[s] = values[s] * gate[:, :, None, None]
        q, k, value = mrla_parts(attention, x)
        keys.append(k)
        values.append(value)
        out = torch.zeros_like(value)
        for g in range(C // d):
            head = slice(g * d, (g + 1) * d)
            scores = [(q[:, head] * k[:, head]).sum(1) / d**0.5 for k in keys]
            weights = torch.stack(scores).softmax(0)
            for w, value in zip(weights, values):
                out[:, head] += w[:, None, None, None] * value[:, head]
        x = x + F.relu(attention.norm(out))
    return x


CASES = {
    'DIA': (DIA, naive_dia, dict(reduction=4)),
    'BA': (BA, naive_ba, dict(reduction=4)),
    'RLAg': (RLAg, naive_rla, dict(hidden=5)),
    'DLALight': (DLALight, naive_dla_light, dict(reduction=2, head_dim=4)),
    'DLABase': (DLABase, naive_dla_base, dict(reduction=2, head_dim=4)),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_naive_loops(name):
    attention, naive, kwargs = CASES[name]
    stage = make_stage(attention, **kwargs)
    x = torch.randn(3, C, 6, 8)
    expected = naive(copy.deepcopy(stage), x)
    torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-5)
    # and nothing is left of the pass
    torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_every_parameter_gets_a_gradient(name):
    attention, _, kwargs = CASES[name]
    stage = make_stage(attention, **kwargs)
    stage(torch.randn(3, C, 6, 8)).square().sum().backward()
    for key, param in stage.named_parameters():
        assert param.grad is not None, key
        # Nobody sees what the last block adds to the memory; before the first
        # there is none, so that one score is weighed alone.
        no_effect = key.startswith('2.layer_attn.norm') and name == 'RLAg'
        no_effect |= key.startswith('0.layer_attn.query') and name == 'DLABase'
        no_effect |= key.startswith('0.layer_attn.input') and name == 'RLAg'
        if not no_effect:
            assert param.grad.abs().sum() > 0, key


@pytest.mark.parametrize('name', CASES)
def test_state_dict_holds_what_is_shared_once(name):
    attention, _, kwargs = CASES[name]
    stage = make_stage(attention, **kwargs)
    storages = [v.data_ptr() for v in stage.state_dict().values() if v.numel()]
    assert len(storages) == len(set(storages))
    other = make_stage(attention, **kwargs)
    for param in other.parameters():
        nn.init.normal_(param)
    other.load_state_dict(stage.state_dict())
    x = torch.randn(2, C, 6, 8)
    torch.testing.assert_close(other.eval()(x), stage.eval()(x))


@pytest.mark.parametrize('name', ['DIA', 'BA', 'RLAg'])
def test_pruned_by_hand_is_the_plain_block(name):
    attention, _, kwargs = CASES[name]
    stage = make_stage(attention, **kwargs).eval()
    for layer_attn in stage.attentions:
        layer_attn.attention_state = AttentionState.PRUNED
    x = torch.randn(2, C, 6, 8)
    expected = x
    for block in stage:
        expected = block.forward(expected)  # without its hooks
    torch.testing.assert_close(stage(x), expected)


def test_what_is_shared_goes_on_when_the_first_is_pruned():
    stage = make_stage(DIA)
    stage[0].layer_attn.attention_state = AttentionState.PRUNED
    stage(torch.randn(3, C, 6, 8)).sum().backward()
    assert all(p.grad is not None for p in stage[0].layer_attn.cell.parameters())


def test_a_copy_shares_within_itself():
    stage = make_stage(DIA)
    other = copy.deepcopy(stage)
    nn.init.zeros_(stage[0].layer_attn.cell.input[2].weight)
    x = torch.randn(2, C, 6, 8)
    assert not torch.allclose(other(x), stage(x))


@pytest.mark.parametrize('reentrant', [True, False])
def test_plugin_under_checkpointing(reentrant):
    """What a plugin does needs no memory, so a block may be computed twice."""
    stage = make_stage(Plugin, 1, plugin=dict(type='SqueezeExcitation', reduction=4))
    x = torch.randn(3, C, 6, 8, requires_grad=True)
    stage(x).square().sum().backward()
    expected = [p.grad.clone() for p in stage.parameters()]
    stage.zero_grad()
    out = torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=reentrant)
    out.square().sum().backward()
    for param, grad in zip(stage.parameters(), expected):
        torch.testing.assert_close(param.grad, grad)


def test_drop_path_leaves_the_branch():
    stage = make_stage(Plugin, 1, plugin=dict(type='SqueezeExcitation'), drop_path=0.5)
    block, attention = stage[0], stage[0].layer_attn
    stage.train()
    for norm in (block.norm1, block.norm2, block.norm3):
        norm.eval()
    x = torch.randn(64, C, 6, 8)
    _, _, branch, identity = parts(block, x)
    out = stage(x)
    kept = F.relu(identity + branch)
    scaled = F.relu(identity + 2 * attention.plugin(branch) - branch)
    is_kept = (out - kept).abs().amax((1, 2, 3)) < 1e-5
    is_scaled = (out - scaled).abs().amax((1, 2, 3)) < 1e-5
    assert (is_kept | is_scaled).all() and is_kept.any() and is_scaled.any()
    torch.testing.assert_close(
        stage.eval()(x), F.relu(identity + attention.plugin(branch))
    )


def test_errors():
    stage = BlockStage(Block(with_cp=True))
    with pytest.raises(ValueError, match='with_cp=True runs a block twice'):
        stage.attach(0, DIA(C))
    block = nn.ModuleDict(dict(linear_conv=nn.Conv2d(C, C, 1)))  # as EfficientNet
    with pytest.raises(
        ValueError, match='ModuleDict is not a block of the ResNet family'
    ):
        BlockStage(block).attach(0, BA(C))
    with pytest.raises(ValueError, match='Linear has no known residual branch'):
        BlockStage(nn.Linear(2, 2)).attach(0, DIA(C))
    with pytest.raises(ValueError, match='reduction=17 leaves none of 16 channels'):
        DIA(C, reduction=17)
    with pytest.raises(ValueError, match='reduction=17 leaves none of 16 channels'):
        BA(C, reduction=17)
    with pytest.raises(ValueError, match='hidden=0'):
        RLAg(C, hidden=0)
    with pytest.raises(ValueError, match='drop_path=0.1 cannot be set, because RLAg'):
        RLAg(C, drop_path=0.1)
    with pytest.raises(TypeError, match='plugin must be a dict'):
        Plugin(C)
    block = make_stage(DIA)[1]
    with pytest.raises(RuntimeError, match='block 1 runs, but not all'):
        block(torch.randn(2, C, 4, 4))
