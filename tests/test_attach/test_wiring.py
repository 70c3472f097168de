import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from mmela import attach_layer_attention
from mmela.attach import wiring
from mmela.convert.slim import slim_state_dict
from mmela.hooks import NetworkKLMeter
from mmela.layers import AttentionState, LayerAttention
from mmela.pruning import FixedCount
from mmela.structure import attention_stages, layer_attentions, prune
from tests.helpers.attachable import Nested, Patches, Trunk, TwoBranches
from tests.helpers.toy import ToyNetwork
from tests.helpers.zoo import ATTENTIONS, PAPERS, STARTS_PLAIN

NETWORKS = {
    'nested': Nested,
    'branches': TwoBranches,
    'tokens': lambda: Patches(8, 1),
    'channels-last': lambda: Patches(8, last=True),
}
KINDS = (*PAPERS, 'MRLALight-output', 'KCLA-within')
SIZE = (16, 24)


def image():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def attach(network, type='MRLABase', **kwargs):
    blocks = kwargs.pop('blocks', 'auto')
    attention = dict(dict(type=type), **kwargs)
    return attach_layer_attention(network, attention, blocks, input_size=SIZE)


def outputs(network):
    out = network(image())
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize(
    'name, attention', list(itertools.product(NETWORKS, KINDS)), ids=str
)
def test_zero_init_changes_nothing_and_learns(name, attention):
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    network = copy.deepcopy(plain)
    kwargs = dict(ATTENTIONS[attention], zero_init=True)
    assert attach(network, **kwargs) is network
    attached = {k for k in network.state_dict() if '.layer_attn.' in k}
    assert set(network.state_dict()) - attached == set(plain.state_dict())
    for mode in (True, False):
        for out, expected in zip(outputs(network.train(mode)), outputs(plain)):
            assert torch.equal(out, expected)

    network.train()
    attentions = layer_attentions(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(out.square().mean() for out in outputs(network)).backward()
        optimizer.step()
    params = [p for a in attentions.values() for p in a.parameters()]
    assert all(param.grad is not None for param in params)
    assert sum(param.grad.abs().sum() for param in params) > 0
    # They have an effect now
    active = outputs(network.eval())
    prune(network, list(attentions))
    for out, other in zip(outputs(network), active):
        assert not torch.equal(out, other)


@pytest.mark.parametrize('name', NETWORKS)
def test_measured_pruned_and_slimmed(name):
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    network = attach(copy.deepcopy(plain)).eval()
    whole = nn.ModuleDict(dict(backbone=network))
    stages = attention_stages(whole)
    assert {stage.network for stage in stages.values()} == {'backbone'}
    meter = NetworkKLMeter(stages)
    meter.attach()
    outputs(network)
    meter.detach()
    decision = meter.decide(FixedCount(count=1))
    assert len(decision.pruned) == 1
    prune(whole, decision.pruned)
    state, blocks = slim_state_dict(whole)
    state = {k.partition('.')[2]: v for k, v in state.items()}
    slim = attach(copy.deepcopy(plain), blocks=blocks['backbone']).eval()
    slim.load_state_dict(state, strict=True)
    assert len(layer_attentions(slim)) == len(layer_attentions(whole)) - 1
    for out, expected in zip(outputs(slim), outputs(network)):
        assert torch.equal(out, expected)


def test_slim_network_without_any_attention():
    plain = Nested()
    network = attach(copy.deepcopy(plain)).eval()
    prune(network, list(layer_attentions(network)))
    state, blocks = slim_state_dict(network)
    assert all(name.startswith('!') for stage in blocks[''] for name in stage)
    slim = attach(copy.deepcopy(plain), blocks=blocks['']).eval()
    assert not layer_attentions(slim) and set(state) == set(plain.state_dict())
    for out, expected in zip(outputs(slim), outputs(plain.eval())):
        assert torch.equal(out, expected)


@pytest.mark.parametrize('first', [True, False])
def test_slim_network_whose_attentions_cross_stages(first):
    """The first of a stage takes over; without it, nothing is taken over."""
    torch.manual_seed(0)
    plain = Trunk(*Nested().groups)
    kwargs = dict(type='KCLA', head_dim=4)
    network = attach(copy.deepcopy(plain), **kwargs).eval()
    names = list(layer_attentions(network))
    crossing = [
        name
        for name, attention in layer_attentions(network).items()
        if hasattr(attention, 'cross_stage')
    ]
    assert crossing == [names[-1]]
    prune(network, [crossing[0] if first else names[0]])
    state, blocks = slim_state_dict(network)
    slim = attach(copy.deepcopy(plain), blocks=blocks[''], **kwargs).eval()
    slim.load_state_dict(state, strict=True)
    assert torch.equal(slim(image()), network(image()))


def test_names_of_attentions():
    network = attach(Nested())
    assert list(layer_attentions(network))[:2] == [
        'groups.0.0.layer_attn',
        'groups.0.1.0.layer_attn',
    ]
    for name, attention in layer_attentions(network).items():
        assert network.get_submodule(name) is attention


@pytest.mark.parametrize(
    'blocks, expected',
    [
        (['layers.*'], [['layers.0', 'layers.1', 'layers.2']]),
        (['layers.2', 'layers.0'], [['layers.0', 'layers.2']]),
        ([['layers.0'], ['layers.1', 'layers.2']], None),
        ([['layers.0'], []], None),
    ],
)
def test_blocks_by_name(blocks, expected):
    network = attach(Patches(8), blocks=blocks)
    found = [list(stage.blocks) for stage in attention_stages(network).values()]
    assert found == [stage for stage in expected or blocks if stage]


@pytest.mark.parametrize(
    'blocks, message',
    [
        ('all', "blocks='all' is not 'auto', a list"),
        ([], r'blocks=\[\] is not'),
        ([1], 'is not'),
        (['layers.0', ['layers.1']], 'is not'),
        (['layers.0', 'layers.0'], "'layers.0' more than once"),
        (['blocks.*'], r"no module 'blocks.\*' runs in the backbone; choose from proj"),
        ([['layers.0', 'proj']], r'blocks\[0\]: .* have the same width and resolution'),
        (['layers.0.norm'], 'layers.0.norm runs more than once'),
        ([[], []], 'lists 2 stages, but the backbone has 1'),
    ],
)
def test_bad_blocks(blocks, message):
    with pytest.raises(ValueError, match=message):
        attach(Patches(8), blocks=blocks)


def test_where_nothing_fits():
    network = Trunk(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3))
    with pytest.raises(
        ValueError,
        match='has no blocks .* Conv2d, Seq.* Name the blocks yourself: blocks=',
    ):
        attach(network)
    with pytest.raises(ValueError, match='runs at none of the sizes'):
        attach(nn.Linear(7, 7))
    with pytest.raises(ValueError, match='already has layer attentions'):
        attach(attach(Patches(8)))


@pytest.mark.parametrize(
    'attention, error, message',
    [
        ('MRLABase', TypeError, 'must be a dict with a type'),
        (
            dict(type='Nothing'),
            KeyError,
            "no layer attention 'Nothing'; .* KCLA, LinearizedMLA, MLA",
        ),
        (dict(type='WithLayerAttention'), KeyError, 'no layer attention'),
        (dict(type='MRLABase', head_dim=3), ValueError, 'does not divide the 8'),
    ],
)
def test_bad_layer_attention(attention, error, message):
    with pytest.raises(error, match=message):
        attach_layer_attention(Patches(8), attention)


def test_identity_of_a_block_with_a_downsample():
    """MRLA-light takes it from the block, and asks for it where it is missing."""
    network = attach(Nested(), 'MRLALight').eval()
    block = network.groups[0][0]
    attention = block.layer_attn
    seen = {}
    block.down.register_forward_hook(lambda m, a, out: seen.update(identity=out))
    attention.register_forward_hook(
        lambda m, args, out: seen.update(memory=args[1].identity)
    )
    outputs(network)
    assert torch.equal(seen['memory'], seen['identity'])

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.conv(x).relu()
            return x + self.scale(x)

    network = Trunk(Other(), nn.Sequential(*Nested().groups[0][1]))
    light = attach(copy.deepcopy(network), 'MRLALight')
    (stage,) = attention_stages(light).values()
    assert list(stage.blocks) == ['body.0', 'body.1.0', 'body.1.1']
    assert len(layer_attentions(light)) == 2
    with pytest.raises(ValueError, match='the input of body.0 does not have the shape'):
        attach(network, 'MRLALight', blocks=['body.0', 'body.1.*'])


class Freezing(Patches):
    """Freezes its first layers by itself, as backbones of the toolboxes do."""

    def __init__(self, dims, frozen_stages):
        super().__init__(dims)
        self.frozen_stages = frozen_stages
        self._freeze_stages()

    def _freeze_stages(self):
        for layer in self.layers[: self.frozen_stages]:
            layer.eval().requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self._freeze_stages()
        return self


@pytest.mark.parametrize('zero_init', [False, True])
def test_blocks_that_a_backbone_freezes(zero_init):
    net = attach(Freezing(8, 1), zero_init=zero_init).train()
    attentions = list(layer_attentions(net).values())
    assert [a.training for a in attentions] == [False, True, True]
    for attention, trained in zip(attentions, (False, True, True)):
        assert {p.requires_grad for p in attention.parameters()} == {trained}
    net = attach(Freezing(8, 3), zero_init=zero_init)
    assert len(layer_attentions(net)) == (0 if zero_init else 3)
    named = attach(Freezing(8, 3), zero_init=zero_init, blocks=['layers.*'])
    assert len(layer_attentions(named)) == 3


@pytest.mark.parametrize('zero_init', [False, True])
def test_a_network_that_its_user_froze_gets_attentions_that_learn(zero_init):
    network = attach(Patches(8).requires_grad_(False), zero_init=zero_init)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert len(layer_attentions(network)) == 3
    assert trained == {n for n, _ in network.named_parameters() if 'layer_attn' in n}
    # Also where the network freezes stages, but none of these
    network = Freezing(8, 1).requires_grad_(False)
    network = attach(network, zero_init=zero_init)
    trained = [a.value.weight.requires_grad for a in layer_attentions(network).values()]
    assert trained == [False, True, True]


def test_copies_are_on_their_own():
    network = attach(Patches(8, 1)).eval()
    expected = outputs(network)[0]
    for clone in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(outputs(clone)[0], expected)
        prune(clone, list(layer_attentions(clone)))
        assert not torch.equal(outputs(clone)[0], expected)
        assert torch.equal(outputs(network)[0], expected)


def test_traced_and_after_an_error():
    network = attach(Patches(8, 1)).eval()
    x = image()
    expected = network(x)
    with pytest.raises(RuntimeError):
        network(x[:, :2])
    with torch.no_grad():
        traced = torch.jit.trace(network, x, check_trace=False)
        torch.testing.assert_close(traced(x), expected)
        torch.testing.assert_close(network(x), expected)


def test_other_resolution_than_that_of_the_trial():
    network = attach(Patches(8, 1)).eval()
    assert network(torch.randn(1, 3, 20, 44)).shape == (1, 1 + 5 * 11, 8)


def test_on_a_meta_device():
    with torch.device('meta'):
        network = Patches(8, 1)
    network = attach(network)
    assert {p.device.type for p in network.parameters()} == {'meta'}
    assert len(layer_attentions(network)) == 3


@pytest.mark.parametrize('attention', STARTS_PLAIN)
def test_a_network_that_sets_all_weights_leaves_attentions_their_start(attention):
    class Network(Patches):
        def init_weights(self):
            for param in self.parameters():
                nn.init.constant_(param, 7.0)

    config = dict(ATTENTIONS[attention], zero_init=True)
    network, fresh = attach(Network(8), **config), attach(Patches(8), **config)
    network.init_weights()
    assert (network.proj.weight == 7).all()
    expected = layer_attentions(fresh)
    for name, module in layer_attentions(network).items():
        for key, param in module.named_parameters():
            start = expected[name].get_parameter(key)
            assert not (param == 7).any(), key
            for value in (0, 1):
                assert (param == value).all() == (start == value).all(), key


def test_weights_that_a_network_loads_stay():
    class Loading(Patches):
        def init_weights(self):
            self.load_state_dict(saved)

    network = attach(Loading(8))
    prune(network, ['layers.1'])
    saved = copy.deepcopy(network.state_dict())
    for reset in (False, True):
        network = attach_layer_attention(
            Loading(8), reset_pruning=reset, input_size=SIZE
        )
        network.init_weights()
        for key, value in network.state_dict().items():
            if not key.endswith('.state'):
                assert torch.equal(value, saved[key]), key
        states = [a.attention_state for a in layer_attentions(network).values()]
        pruned = AttentionState.ACTIVE if reset else AttentionState.PRUNED
        assert states == [0, pruned, 0]


def test_stages_of_a_transformer_without_stages():
    network = Patches(8)
    network.layers = nn.ModuleList(copy.deepcopy(network.layers[0]) for _ in range(10))
    network = attach(network)
    stages = attention_stages(network)
    assert [len(stage.blocks) for stage in stages.values()] == [4, 4, 2]
    assert list(stages) == ['layers.0-3', 'layers.4-7', 'layers.8-9']


def test_table_of_what_was_found(monkeypatch):
    said = []
    monkeypatch.setattr(wiring, 'print_log', lambda text, *args: said.append(text))
    attach(Patches(8, 1))
    (text,) = said
    assert text.splitlines()[0] == 'Layer attention of Patches:'
    cells = [cell.strip() for cell in text.splitlines()[-1].strip('|').split('|')]
    assert cells == [
        *('0', '3', 'layers.0 ... layers.2', 'Layer', '8', '8'),
        '4x6, BLC, 1 more',
    ]


@pytest.mark.parametrize(
    'name, kinds',
    [
        ('mobilenet_v2', {'InvertedResidual'}),
        ('regnet_x_400mf', {'ResBottleneckBlock'}),
        ('swin_v2_t', {'SwinTransformerBlockV2'}),
        ('vit_b_32', {'EncoderBlock'}),
    ],
)
def test_torchvision(name, kinds):
    models = pytest.importorskip('torchvision.models')
    network = models.get_model(name, weights=None)
    size = (224, 224) if 'vit' in name else (64, 96)
    attach_layer_attention(network, input_size=size)
    stages = attention_stages(network).values()
    blocks = [block for stage in stages for block in stage.blocks.values()]
    assert {type(block).__name__ for block in blocks} == kinds
    assert all(isinstance(a, LayerAttention) for s in stages for a in s.attentions)


def test_names_of_the_table_can_be_pruned():
    """By block, with or without the network before and layer_attn behind."""
    model = nn.ModuleDict(dict(student=ToyNetwork(dict(type='MRLABase', head_dim=4))))
    names = ['layer1.1', 'student.layer1.2', 'layer2.1.layer_attn']
    prune(model, [*names, 'student.layer2.3.layer_attn'])
    gone = [name for name, a in layer_attentions(model).items() if not a.active]
    assert gone == [
        f'student.{name}.layer_attn'
        for name in ('layer1.1', 'layer1.2', 'layer2.1', 'layer2.3')
    ]
    with pytest.raises(TypeError, match=r"names='layer2.2' is a string; .*\['layer2.2"):
        prune(model, 'layer2.2')
    with pytest.raises(KeyError, match="'layer2.9'.*with one: student.layer2.0, "):
        prune(model, ['layer2.2', 'layer2.9'])
    assert layer_attentions(model)['student.layer2.2.layer_attn'].active
    model['teacher'] = ToyNetwork(dict(type='MRLABase', head_dim=4))
    both = 'student.layer2.2.layer_attn, teacher.layer2.2.layer_attn'
    with pytest.raises(KeyError, match=f"'layer2.2' may be any of {both}"):
        prune(model, ['layer2.2'])
