"""``ELA<X>`` is ``WithLayerAttention`` over ``<X>`` by another name."""

import itertools
import re

import pytest
import torch
from mmengine.registry import MODELS

from mmela.layers import AttentionState
from mmela.pruning import EBQM, FixedCount
from mmela.registry import LAYER_ATTENTIONS
from mmela.structure import attention_stages, layer_attentions, prune
from tests.helpers.backbones import (
    ALSO_FITTING,
    BACKBONES,
    FITTING,
    OTHERS,
    RESNETS,
    build_in,
    build_plain,
)
from tests.helpers.zoo import (
    ATTENTIONS,
    WITHIN_BLOCKS,
    decide,
    equal,
    run,
    slim,
    stir,
    tensors,
)

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def ways(scope, name, attention, config=None, **kwargs):
    """How to build a network in each of the two ways, with more arguments."""
    backbone = dict(BACKBONES[scope, name], **(config or {}))
    for key in backbone.keys() & {'layers_per_stage'}:
        kwargs[key] = backbone.pop(key)
    by_name = dict(type=f'ELA{name}', layer_attention=attention, **kwargs)
    wrapped = dict(backbone, type=name)
    by_name.update(backbone)
    wrapper = dict(
        type='mmela.WithLayerAttention',
        backbone=wrapped,
        layer_attention=attention,
        input_size=(64, 64),  # of its trial, which is faster so
        **kwargs,
    )
    return (
        lambda **more: build_in(scope, dict(by_name, **more)),
        lambda **more: build_in(scope, dict(wrapper, **more)),
    )


def pair(*args, **kwargs):
    """A network built in both ways, with the same weights as after some training."""
    one, other = (make() for make in ways(*args, **kwargs))
    stir(one)
    other.load_state_dict(one.state_dict(), strict=True)
    return one, other


def described(network):
    """What of attentions is no tensor: stages, classes, heads, drop rates, shares."""
    first = {}
    found = {n: list(s.named) for n, s in attention_stages(network).items()}
    for name, attention in layer_attentions(network).items():
        shared = [
            (key, first.setdefault(id(param), f'{name}.{key}'))
            for key, param in attention.named_parameters()
        ]
        drop = getattr(attention.drop_path, 'drop_prob', 0.0)
        head_dim = getattr(attention, 'head_dim', None)
        found[name] = (type(attention), head_dim, drop, repr(attention), shared)
    return found


def differences(one, other):
    """Where two dicts differ; a few of the keys, as there can be hundreds."""
    keys = [k for k in {**one, **other} if one.get(k, ()) != other.get(k, ())]
    return [(k, one.get(k), other.get(k)) for k in keys[:3]]


def drop_rates(network):
    return [
        round(float(getattr(a.drop_path, 'drop_prob', 0.0) or 0.0), 6)
        for a in layer_attentions(network).values()
    ]


def test_every_backbone_and_every_attention_is_in_the_tables():
    names = set()
    for scope in ('mmdet', 'mmpretrain', 'mmseg'):
        pytest.importorskip(f'{scope}.models')
        registry = MODELS.children[scope]
        registry.get('ResNet')  # which imports what belongs to the scope
        names |= {(scope, n[3:]) for n in registry.module_dict if n[:3] == 'ELA'}
    assert names == set(BACKBONES)
    classes = {
        name
        for name, kind in LAYER_ATTENTIONS.module_dict.items()
        if isinstance(kind, type)
        and kind.__module__.startswith(('mmela.layers.', 'mmela.baselines.'))
    }
    assert classes == {config['type'] for config in ATTENTIONS.values()}


@pytest.mark.parametrize('scope, name, attention', FITTING)
def test_the_same_parameters_and_attentions(scope, name, attention):
    one, other = (make() for make in ways(scope, name, ATTENTIONS[attention]))
    shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (one, other)]
    assert not differences(*shapes)
    trained = [
        {k: p.requires_grad for k, p in n.named_parameters()} for n in (one, other)
    ]
    assert not differences(*trained)
    assert not differences(described(one), described(other))
    assert len(layer_attentions(one)) > 1


@pytest.mark.parametrize(
    'scope, name, attention',
    [p for p in FITTING if p.values[2] in ('MRLABase', 'KCLA', 'DLALight')]
    + [
        pytest.param('mmdet', 'ResNet', name, id=f'mmdet-ResNet-{name}')
        for name in ATTENTIONS
        if name not in ('MRLABase', 'KCLA', 'DLALight')
    ],
)
def test_the_same_outputs_and_gradients(scope, name, attention):
    one, other = pair(scope, name, ATTENTIONS[attention])
    one.eval(), other.eval()
    assert equal(run(one, X), run(other, X))
    gradients = []
    for network in (one, other):
        network.train()
        torch.manual_seed(3)  # the same draws of stochastic depth
        outs = tensors(network(X))
        sum(out.square().mean() for out in outs).backward()
        gradients.append({k: p.grad for k, p in network.named_parameters()})
    for key, grad in gradients[0].items():
        assert (grad is None) == (gradients[1][key] is None), key
        assert grad is None or torch.equal(grad, gradients[1][key]), key
    attended = [k for k, grad in gradients[0].items() if 'layer_attn' in k]
    assert any(gradients[0][k].abs().sum() > 0 for k in attended)
    for key, buffer in one.named_buffers():  # statistics of norms moved alike
        assert torch.equal(buffer, dict(other.named_buffers())[key]), key


@pytest.mark.parametrize('scope, name', BACKBONES)
def test_the_same_decisions_and_slim_networks(scope, name):
    one, other = pair(scope, name, dict(type='MRLABase'))
    one.eval(), other.eval()
    policies = (EBQM(gamma=0.8, alpha=2, beta=5, mu=0.2), FixedCount(count=2))
    for mine, theirs in zip(decide(one, X, *policies), decide(other, X, *policies)):
        assert [vars(layer) for layer in mine.layers] == [
            vars(layer) for layer in theirs.layers
        ]
        assert mine.pruned == theirs.pruned
    stages = attention_stages(one).items()
    order = [(name, stage) for stage, members in stages for name in members.named]
    assert [(layer.name, layer.stage) for layer in mine.layers] == order
    assert len(mine.pruned) == 2
    makes = ways(scope, name, dict(type='MRLABase'))
    for network, make in zip((one, other), makes):
        prune(network, mine.pruned)
        small = slim(network, make)
        assert len(layer_attentions(small)) == len(layer_attentions(network)) - 2
        assert equal(run(small, X), run(network, X))
        # A slim network of one way is one of the other, too
        for again in makes:
            assert equal(run(slim(network, again), X), run(network, X))


@pytest.mark.parametrize('attention', ['KCLA', 'DLALight', 'RLAg', 'DIA'])
@pytest.mark.parametrize('which', ['first', 'second', 'a whole stage'])
def test_slim_of_attentions_that_share(attention, which):
    """The first of a stage holds what is shared, or takes over the stage before."""
    one, other = pair('mmdet', 'ResNet', ATTENTIONS[attention], depth_of_two())
    one.eval(), other.eval()
    names = [n for n in layer_attentions(one) if n.startswith('layer2.')]
    names = dict(zip(('first', 'second'), ([n] for n in names))).get(which, names)
    makes = ways('mmdet', 'ResNet', ATTENTIONS[attention], depth_of_two())
    for network, make in zip((one, other), makes):
        prune(network, names)
        assert equal(run(slim(network, make), X), run(network, X))
    assert equal(run(one, X), run(other, X))


def depth_of_two():
    return dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))


@pytest.mark.parametrize('scope, name', RESNETS)
@pytest.mark.parametrize(
    'attention, expected',
    [
        (dict(type='MRLABase'), 0.0),
        (dict(type='MRLABase', drop_path=0.25), 0.25),
        (dict(type='KCLA'), 0.2),
        (dict(type='KCLA', drop_path=0.0), 0.0),
    ],
    ids=str,
)
def test_stochastic_depth_of_resnets_is_that_of_the_config(
    scope, name, attention, expected
):
    """Whatever that of the block is: published so."""
    for make in ways(scope, name, attention):
        assert set(drop_rates(make())) == {expected}


@pytest.mark.parametrize('scope, name', OTHERS)
@pytest.mark.parametrize('attention', ['MRLABase', 'MRLALight', 'KCLA'])
def test_stochastic_depth_of_other_networks_is_that_of_the_block(
    scope, name, attention
):
    for make in ways(scope, name, ATTENTIONS[attention]):
        network = make()
        rates = []
        for key in layer_attentions(network):
            block = network.get_submodule(key[: -len('.layer_attn')])
            rates.append(rate_of(block))
        assert drop_rates(network) == rates
        assert max(rates) > 0.05
    for make in ways(scope, name, dict(ATTENTIONS[attention], drop_path=0.25)):
        assert set(drop_rates(make())) == {0.25}


def rate_of(block):
    """Rate of the stochastic depth of a block, without its attention's."""
    for name, module in block.named_modules():
        if 'layer_attn' not in name and type(module).__name__ == 'DropPath':
            return round(float(module.drop_prob), 6)
    return 0.0


@pytest.mark.parametrize('attention', ['MRLABase', 'MRLALight', 'DLABase'])
@pytest.mark.parametrize('width', [12, 20, 24])
@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain', 'mmseg'])
def test_default_head_dim_divides_the_channels(scope, width, attention):
    """The largest up to 32."""
    cfg = dict(base_channels=width, stem_channels=width)
    for make in ways(scope, 'ResNet', ATTENTIONS[attention], cfg):
        for module in layer_attentions(make()).values():
            divisors = [d for d in range(1, 33) if module.channels % d == 0]
            assert module.head_dim == divisors[-1]


@pytest.mark.parametrize(
    'attention',
    [
        dict(type='MRLABase'),
        dict(type='MRLABase', zero_init=True),
        dict(type='KCLA', zero_init=True),
        dict(type='KCLA', small_init=0.2),
        dict(type='MRLALight', small_init=0.2),
        dict(type='DLALight', zero_init=True),
    ],
    ids=str,
)
@pytest.mark.parametrize('stages', [0, 1, 2, 4])
def test_frozen_stages(attention, stages):
    cfg = dict(frozen_stages=stages, norm_eval=True)
    one, other = pair('mmdet', 'ResNet', attention, cfg)
    for network in (one, other):
        network.train()
    assert not differences(described(one), described(other))
    modes = [{k: m.training for k, m in n.named_modules()} for n in (one, other)]
    assert not differences(*modes)
    assert [p.requires_grad for p in one.parameters()] == [
        p.requires_grad for p in other.parameters()
    ]
    outputs = []
    for network in (one, other):
        torch.manual_seed(0)  # of the stochastic depth of KCLA
        outputs.append(run(network, X))
    assert equal(*outputs)


@pytest.mark.parametrize(
    'scope, name, attention',
    [
        (*key, attention)
        for key, attention in itertools.product(OTHERS, WITHIN_BLOCKS)
        if (key[1], attention) not in ALSO_FITTING
    ],
)
def test_both_refuse_what_works_within_the_blocks_of_resnets(scope, name, attention):
    messages = []
    for make in ways(scope, name, ATTENTIONS[attention]):
        with pytest.raises(ValueError) as error:
            make()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    reasons = 'works on .* returns BLC|a block of the ResNet family|drop_path=.*RLAg'
    assert re.search(reasons, messages[0])


@pytest.mark.parametrize(
    'scope, name', [('mmdet', 'ResNet'), ('mmpretrain', 'ResNet_CIFAR')]
)
@pytest.mark.parametrize('pruned', [False, True])
def test_a_checkpoint_of_one_way_starts_the_other(tmp_path, scope, name, pruned):
    attention = dict(type='MRLABase')
    makes = ways(scope, name, attention)
    for first, second in (makes, makes[::-1]):
        network = stir(first())
        if pruned:
            prune(network, list(layer_attentions(network))[1:3])
        torch.save(dict(state_dict=network.state_dict()), tmp_path / 'x.pth')
        init = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
        for reset in (False, True):
            new = second(init_cfg=init, reset_pruning=reset)
            new.init_weights()
            states = [a.attention_state for a in layer_attentions(new).values()]
            gone = pruned and not reset
            assert states.count(AttentionState.PRUNED) == (2 if gone else 0)
            for key, value in network.state_dict().items():
                if not key.endswith('.state'):
                    assert torch.equal(new.state_dict()[key], value), key


@pytest.mark.parametrize('scope, name', BACKBONES)
def test_it_is_the_backbone(scope, name):
    """Its class, attributes, methods and keys, with ``layer_attn`` in its blocks."""
    plain = build_plain(scope, name)
    for make in ways(scope, name, dict(type='MRLABase')):
        network = make()
        assert isinstance(network, type(plain))
        maps = [[out.shape for out in run(net, X)] for net in (network, plain)]
        assert maps[0] == maps[1]
        own = [key for key in network.state_dict() if '.layer_attn.' not in key]
        assert not set(own) ^ set(plain.state_dict())
        names = dict(network.named_children())
        assert list(names) == list(dict(plain.named_children()))
        for key in layer_attentions(network):
            block, _, last = key.rpartition('.')
            assert last == 'layer_attn'
            assert type(network.get_submodule(block)) is type(
                plain.get_submodule(block)
            )
