"""Attach does all or nothing, and a forward pass that ends early leaves nothing."""

import copy
import functools
import gc

import pytest
import torch
from torch import nn

from mmela import attach_layer_attention
from mmela.registry import find_layer_attention
from mmela.structure import layer_attentions
from tests.helpers.attachable import Conv, Trunk
from tests.helpers.zoo import (
    ATTENTIONS,
    NETWORKS,
    ONE_OF_EACH,
    assert_same_snapshot,
    attach,
    attached,
    equal,
    image,
    plain,
    run,
    snapshot,
)

BAD = {
    'unknown': dict(type='Nothing'),
    'no type': dict(head_dim=8),
    'head_dim 0': dict(type='MRLABase', head_dim=0),
    'head_dim': dict(type='MRLABase', head_dim=7),
    'drop_path': dict(type='MRLABase', drop_path=1.5),
    'small_init': dict(type='MRLABase', small_init=0.2, zero_init=True),
    'previous': dict(type='MRLALight', previous='nothing'),
    'backend': dict(type='MRLABase', backend='nothing'),
    'argument': dict(type='MRLABase', nothing=1),
    'norm': dict(type='MRLABase', norm_cfg=dict(type='Nothing')),
    'norm argument': dict(type='MRLABase', norm_cfg=dict(type='GN', num_groups=7)),
}


def refuse(network, name, attention, errors=(ValueError, TypeError, KeyError), **kw):
    before = snapshot(network)
    kw = dict(dict(input_size=NETWORKS[name].size), **kw)
    with pytest.raises(errors):
        attach_layer_attention(network, attention, **kw)
    assert_same_snapshot(network, before)


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('attention', BAD)
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_bad_attentions(name, attention, mode):
    network = plain(name)
    network.train(mode)
    refuse(network, name, BAD[attention])
    # And right arguments then do what they do on a new network
    network.eval()
    again = attach(network, name)
    again.eval()
    new = attached(name)
    assert list(layer_attentions(again)) == list(layer_attentions(new))
    again.load_state_dict(new.state_dict())
    assert equal(run(again, image(name)), run(new, image(name)))


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize(
    'blocks', ['all', [], ['nothing.*'], [[]] * 99, [1], [['stem'], 'stem'], ['*', '*']]
)
def test_bad_blocks(name, blocks):
    refuse(plain(name), name, dict(type='MRLABase'), ValueError, blocks=blocks)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_attached_twice(name):
    refuse(attached(name), name, dict(type='MRLALight'), ValueError)


@pytest.mark.parametrize('error', [ValueError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('number', [1, 2, 3])
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_a_constructor_that_fails(monkeypatch, attention, number, error):
    """At the first attention, or where some are built already."""
    kind = find_layer_attention(ATTENTIONS[attention]['type'])
    built = []
    original = kind.__init__

    @functools.wraps(original)  # keeps its signature, which wiring reads
    def failing(self, *args, **kwargs):
        built.append(self)
        if len(built) == number:
            raise error('in the constructor')
        original(self, *args, **kwargs)

    network = plain('mmdet.ResNet')
    monkeypatch.setattr(kind, '__init__', failing)
    refuse(network, 'mmdet.ResNet', ATTENTIONS[attention], error)
    monkeypatch.undo()
    assert len(built) == number
    assert layer_attentions(attach(network, 'mmdet.ResNet', attention))


class Failing(Conv):
    """A block that raises when it is told to."""

    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error('in the block')
        return super().forward(x)


class Network(Trunk):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 1), *(Failing(8, 8) for _ in range(4)))


@pytest.mark.parametrize('index', [1, 2, 4])
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_trial_that_fails(error, index):
    network = Network()
    network.body[index].error = error
    before = snapshot(network)
    with pytest.raises((ValueError, error)):
        attach_layer_attention(network, input_size=(16, 24))
    assert_same_snapshot(network, before)
    network.body[index].error = None
    attach_layer_attention(network, input_size=(16, 24))
    assert len(layer_attentions(network)) == 4


def test_the_trial_leaves_no_trace():
    """Modes, statistics, gradients, random numbers and flags stay as they were."""
    for name in NETWORKS:
        network = plain(name)
        network.train()
        for param in list(network.parameters())[::2]:
            param.requires_grad_(False)
        own = {k: v.clone() for k, v in network.state_dict().items()}
        flags = {k: p.requires_grad for k, p in network.named_parameters()}
        modes = {k: m.training for k, m in network.named_modules()}
        attach(network, name)
        for key, value in own.items():
            assert torch.equal(network.state_dict()[key], value), (name, key)
        for key, flag in flags.items():
            assert network.get_parameter(key).requires_grad == flag, (name, key)
        for key, mode in modes.items():
            assert network.get_submodule(key).training == mode, (name, key)


# -- forward passes that end early ---------------------------------------------


def alive(batch):
    """Tensors of a batch size that nothing else has."""
    gc.collect()
    return [
        o
        for o in gc.get_objects()
        # Traced tensors of other tests have symbols as sizes
        if torch.is_tensor(o) and o.dim() and isinstance(o.shape[0], int)
        if o.shape[0] == batch
    ]


@pytest.mark.parametrize(
    'attention', ['MRLABase', 'MRLALight', 'KCLA', 'MLA', 'DLABase']
)
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError, GeneratorExit])
@pytest.mark.parametrize('index', [1, 2, 4])
@pytest.mark.parametrize('training', [False, True])
def test_nothing_is_left_of_an_interrupted_pass(attention, error, index, training):
    torch.manual_seed(0)
    network = Network()
    attach_layer_attention(network, ATTENTIONS[attention], input_size=(16, 24))
    network.train(training)
    reference = copy.deepcopy(network)
    block_alone = outcome(network.body[2])
    for _ in range(3):
        network.body[index].error = error
        with pytest.raises(error):
            network(torch.randn(37, 3, 16, 24))
        network.body[index].error = None
    assert not alive(37)
    # A block that is called by itself does as before the interruption
    assert same_outcome(outcome(network.body[2]), block_alone)
    network.load_state_dict(reference.state_dict())
    network.eval(), reference.eval()
    x = torch.randn(2, 3, 16, 24)
    assert equal(run(network, x), run(reference, x))


@pytest.mark.parametrize('attention', ['MRLABase', 'KCLA', 'DLABase'])
@pytest.mark.parametrize('index', [1, 2, 4])
def test_nothing_is_left_of_a_pass_that_ends_between_blocks(attention, index):
    network = Network()
    attach_layer_attention(network, ATTENTIONS[attention], input_size=(16, 24))

    def interrupt(*args):
        raise KeyboardInterrupt

    network.body[index].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        network(torch.randn(37, 3, 16, 24))
    assert not alive(37)


def outcome(block):
    x = torch.randn(2, 8, 16, 24, generator=torch.Generator().manual_seed(1))
    mode = block.training
    try:
        return block.eval()(x).detach()
    except RuntimeError as error:
        return str(error)
    finally:
        block.train(mode)


def same_outcome(one, other):
    if isinstance(one, str) or isinstance(other, str):
        return one == other if type(one) is type(other) else False
    return torch.equal(one, other)


def test_nothing_is_left_of_a_whole_pass():
    """In inference; in training it goes with the graph."""
    for name in NETWORKS:
        network = attached(name)
        run(network, image(name, batch=11))
        assert not alive(11), name
