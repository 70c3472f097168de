"""Networks of unusual structure: as their ordinary twins, or refused by name."""

import collections
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmela import attach_layer_attention, structure
from mmela.structure import layer_attentions, prune
from tests.helpers.zoo import (
    AFTER_BLOCKS,
    attach,
    attached,
    equal,
    gap,
    image,
    plain,
    run,
    stir,
    tensors,
    toolbox,
)

SIZE = (16, 24)
C = 8


def picture():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block. What it takes and returns is for others to change."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)

    def branch(self, x):
        return F.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return x + self.branch(x)


class Ordinary(nn.Module):
    """Stem and blocks, called one after the other."""

    block = Block
    depth = 4

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        for index in range(self.depth):
            setattr(self, f'block{index}', self.block())

    def blocks(self):
        return [getattr(self, f'block{index}') for index in range(self.depth)]

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks():
            x = block(x)
        return x


def of_blocks(block_class):
    return type(f'Of{block_class.__name__}', (Ordinary,), dict(block=block_class))


# -- how the root runs its blocks ---------------------------------------------


class LoopOverChildren(Ordinary):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class LoopOverItems(nn.ModuleDict):
    def __init__(self):
        super().__init__(Ordinary().named_children())

    def forward(self, x):
        for child in self.values():
            x = child(x)
        return x


class LoopOverNames(Ordinary):
    def forward(self, x):
        for name, child in self.named_children():
            x = child(x) if name else x
        return x


class SequentialRoot(nn.Sequential):
    def __init__(self):
        super().__init__(collections.OrderedDict(Ordinary().named_children()))


class CountsItsChildren(Ordinary):
    def forward(self, x):
        assert len(list(self.children())) == 1 + self.depth
        return super().forward(x)


# -- what blocks take and return -----------------------------------------------

Named = collections.namedtuple('Named', 'x aux')


class TupleBlock(Block):
    def forward(self, x):
        x, aux = x if isinstance(x, tuple) else (x, None)
        return super().forward(x), aux


class NoteAfterTuple(Block):
    """Returns maps of which the second is what attention is not given to."""

    def forward(self, x):
        x = x[0] if isinstance(x, tuple) else x
        branch = self.branch(x)
        return x + branch, branch.mean((2, 3))


class ListBlock(Block):
    def forward(self, x):
        return [super().forward(x[0] if isinstance(x, list) else x), 'note']


class NamedBlock(Block):
    def forward(self, x):
        return Named(super().forward(x.x if isinstance(x, Named) else x), 1)


class DictBlock(Block):
    def forward(self, x):
        x = x['x'] if isinstance(x, dict) else x
        return dict(x=super().forward(x), note='text')


class Output(collections.OrderedDict):
    """As classes of Hugging Face return their results."""

    @property
    def x(self):
        return self['x']


class OutputBlock(Block):
    def forward(self, x):
        return Output(x=super().forward(x.x if isinstance(x, Output) else x))


class KeywordBlock(Block):
    def forward(self, *, note=None, x):
        return super().forward(x)


def unpacked(block_class, get):
    """A network that takes the map out of what its blocks return in the end."""

    class Network(of_blocks(block_class)):
        def forward(self, x):
            return get(super().forward(x))

    return Network


class Keywords(of_blocks(KeywordBlock)):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks():
            x = block(note='text', x=x)
        return x


# -- blocks that change things in place ----------------------------------------


class AddsInPlace(Block):
    def forward(self, x):
        x += self.branch(F.relu(x))
        return x


class Adds(Block):
    def forward(self, x):
        return x + self.branch(F.relu(x))


class ReluInPlaceFirst(Block):
    def forward(self, x):
        x = F.relu(x, inplace=True)
        return x + self.branch(x)


class ReluFirst(Block):
    def forward(self, x):
        x = F.relu(x)
        return x + self.branch(x)


class HalvesInput(Block):
    def forward(self, x):
        out = x + self.branch(x)
        with torch.no_grad():
            x.zero_()
        return out


class ScalesInPlaceBetween(Ordinary):
    """The network changes what a block has returned before it goes on."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks():
            x = block(x).mul_(0.5)
        return x


class ScalesBetween(Ordinary):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks():
            x = block(x) * 0.5
        return x


# -- blocks that hold their parts in other ways --------------------------------


class LoopsOverParts(Block):
    """A child more would be run as one of its layers."""

    def forward(self, x):
        out = x
        for child in self.children():
            out = child(out)
        return x + F.relu(out)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class SequentialBlock(nn.Sequential):
    def __init__(self):
        super().__init__(
            collections.OrderedDict(
                conv=nn.Conv2d(C, C, 3, padding=1), norm=nn.BatchNorm2d(C)
            )
        )


class PlainBlock(Block):
    def forward(self, x):
        return self.norm(self.conv(x))


class SequentialSubclass(SequentialBlock):
    def forward(self, x):
        return x + F.relu(super().forward(x))


ALL = [f'block{index}' for index in range(Ordinary.depth)]
TWINS = {
    'root loops over children': (LoopOverChildren, Ordinary, 'auto'),
    'root loops over names': (LoopOverNames, Ordinary, 'auto'),
    'root is a ModuleDict': (LoopOverItems, Ordinary, 'auto'),
    'root is a Sequential': (SequentialRoot, Ordinary, 'auto'),
    'root counts its children': (CountsItsChildren, Ordinary, 'auto'),
    'tuple': (unpacked(TupleBlock, lambda out: out[0]), Ordinary, ALL),
    'tuple of two': (unpacked(NoteAfterTuple, lambda out: out[0]), Ordinary, ALL),
    'list': (unpacked(ListBlock, lambda out: out[0]), Ordinary, ALL),
    'namedtuple': (unpacked(NamedBlock, lambda out: out.x), Ordinary, ALL),
    'dict': (unpacked(DictBlock, lambda out: out['x']), Ordinary, ALL),
    'output class': (unpacked(OutputBlock, lambda out: out.x), Ordinary, ALL),
    'keywords alone': (Keywords, Ordinary, ALL),
    'adds in place': (of_blocks(AddsInPlace), of_blocks(Adds), 'auto'),
    'relu in place first': (of_blocks(ReluInPlaceFirst), of_blocks(ReluFirst), 'auto'),
    'input is overwritten': (of_blocks(HalvesInput), Ordinary, 'auto'),
    'scaled in place between': (ScalesInPlaceBetween, ScalesBetween, 'auto'),
    'block loops over parts': (of_blocks(LoopsOverParts), Ordinary, 'auto'),
    'block is a Sequential': (of_blocks(SequentialBlock), of_blocks(PlainBlock), ALL),
    'block is a subclass of it': (of_blocks(SequentialSubclass), Ordinary, 'auto'),
}
MUST_WORK = [
    *(kind for kind in TWINS if kind.startswith('root')),
    *('tuple', 'tuple of two', 'list', 'namedtuple', 'dict', 'keywords alone'),
    *('adds in place', 'relu in place first', 'scaled in place between'),
]


def give(network, attention='MRLABase', blocks='auto', **kwargs):
    config = dict(AFTER_BLOCKS[attention], **kwargs)
    attach_layer_attention(network, config, blocks, input_size=SIZE)
    return network


def pass_of(network, x):
    """Output and gradients of a training pass."""
    network.train()
    network.zero_grad()
    torch.manual_seed(0)
    outs = tensors(network(x))
    sum(out.square().mean() for out in outs).backward()
    gradients = {k: p.grad for k, p in network.named_parameters()}
    return [out.detach() for out in outs], gradients


def assert_close(one, other):
    assert gap(one[0], other[0]) < 1e-6
    assert one[1].keys() == other[1].keys()
    for key, grad in one[1].items():
        assert (grad is None) == (other[1][key] is None), key
        if grad is not None:
            torch.testing.assert_close(grad, other[1][key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('kind', TWINS)
def test_as_its_twin(kind, attention):
    """The same outputs and gradients as a network that is written in the usual way."""
    odd_class, twin_class, blocks = TWINS[kind]
    torch.manual_seed(0)
    odd, twin = stir(odd_class()).double(), twin_class().double()
    x = picture().double()
    twin.load_state_dict(odd.state_dict())
    odd.eval(), twin.eval()
    assert equal(run(odd, x), run(twin, x))
    # An overwritten input is for no training
    can_train = kind != 'input is overwritten'
    if can_train:
        assert_close(pass_of(copy.deepcopy(odd), x), pass_of(copy.deepcopy(twin), x))
    try:
        give(odd, attention, blocks)
    except ValueError as error:
        assert kind not in MUST_WORK, error
        assert 'block' in str(error)
        return
    give(twin, attention, blocks)
    assert list(layer_attentions(odd)) == list(layer_attentions(twin))
    assert list(layer_attentions(odd)) == [f'{name}.layer_attn' for name in ALL]
    for seed, module in enumerate(layer_attentions(odd).values()):
        stir(module, seed)
    twin.load_state_dict(odd.state_dict())
    for pruned, keep in ((None, False), (ALL[1], False), (ALL[2], True)):
        if pruned:
            for network in (odd, twin):
                prune(network, [f'{pruned}.layer_attn'], keep and has_value(attention))
        odd.eval(), twin.eval()
        assert gap(run(odd, x), run(twin, x)) < 1e-9
        if can_train:
            assert_close(pass_of(odd, x), pass_of(twin, x))


def has_value(attention):
    return attention in ('MRLABase', 'MLA', 'DLABase')


@pytest.mark.parametrize('attention', ['MRLABase', 'MLA'])
def test_a_memory_without_value_convolution(attention):
    """What is kept is the output itself, which the next block changes in place."""
    for kind in ('adds in place', 'relu in place first', 'scaled in place between'):
        odd_class, twin_class, _ = TWINS[kind]
        torch.manual_seed(0)
        odd, twin = stir(odd_class()).double(), twin_class().double()
        for network in (odd, twin):
            give(network, attention, value_conv=False)
        twin.load_state_dict(odd.state_dict())
        x = picture().double()
        assert_close(pass_of(odd, x), pass_of(twin, x))


# -- blocks that return several maps of equal standing -------------------------


class SeveralMaps(Block):
    """As those of TridentNet: one map for each branch in training."""

    def forward(self, xs):
        xs = xs if isinstance(xs, list) else [xs] * 3
        if not self.training:
            return [Block.forward(self, xs[0])]
        return [Block.forward(self, x) for x in xs]


class AlwaysSeveral(Block):
    def forward(self, xs):
        xs = xs if isinstance(xs, list) else [xs] * 3
        return [Block.forward(self, x) for x in xs]


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('block_class', [SeveralMaps, AlwaysSeveral])
def test_several_maps_are_all_attended_over_or_refused(block_class, attention):
    torch.manual_seed(0)
    network = stir(of_blocks(block_class)())
    try:
        give(network, attention, drop_path=0.0)
        network.train()
        outs = tensors(network(picture()))
    except (ValueError, RuntimeError) as error:
        assert 'block' in str(error)
        return
    # The branches were given the same, and each is treated alike
    assert len(outs) == 3
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def branches(network):
    """What the first block of the last stage returns in training."""
    seen = []
    network.train()
    network.layer3[0].register_forward_hook(lambda m, args, out: seen.extend(out))
    network(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    return [out.detach() for out in seen]


def test_trident():
    pytest.importorskip('mmdet.models')
    torch.manual_seed(0)
    cfg = dict(depth=50, base_channels=8, num_branch=3, test_branch_idx=1)
    cfg.update(trident_dilations=(1, 2, 3), num_stages=3, out_indices=(2,))
    cfg.update(strides=(1, 2, 2), dilations=(1, 1, 1), norm_eval=True)
    network = stir(toolbox('mmdet', 'TridentResNet', **cfg)())
    try:
        attach_layer_attention(network, input_size=(64, 64))
        without = copy.deepcopy(network)
        names = [n for n in layer_attentions(without) if n.startswith('layer3')]
        assert names
        prune(without, names)
        outs = [branches(each) for each in (network, without)]
    except (ValueError, RuntimeError) as error:
        assert 'layer3' in str(error)
        return
    assert len(outs[0]) == len(outs[1]) == 3
    for one, other in zip(*outs):
        assert not torch.equal(one, other)


# -- blocks that do not run, or not always -------------------------------------


class OtherMethod(Block):
    def other(self, x):
        return Block.forward(self, x)


class CalledByAnotherName(of_blocks(OtherMethod)):
    """As DetectoRS: blocks run by another method wherever there is more to say."""

    another = False

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks():
            x = block.other(x) if self.another else block(x)
        return x


def test_attentions_that_no_pass_reaches_are_named():
    network = give(CalledByAnotherName())
    names = [f'{name}.layer_attn' for name in ALL]
    assert structure.unreached(network) == names  # the trial does not count
    network.another = True
    network.train()(picture())
    assert structure.unreached(network) == names
    network.another = False
    network(picture())
    assert structure.unreached(network) == []


def test_unreached_leaves_out_what_is_pruned():
    network = give(CalledByAnotherName())
    names = list(layer_attentions(network))
    prune(network, names[1:2])
    assert structure.unreached(network) == [names[0], *names[2:]]
    network.train()(picture())
    assert structure.unreached(network) == []


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
def test_a_block_that_is_called_by_another_name_alone(attention):
    network = CalledByAnotherName()
    network.another = True
    with pytest.raises(ValueError, match='block0'):
        give(network, attention, ALL)
    try:
        give(network, attention)
    except ValueError as error:
        assert 'block' in str(error)
    else:  # something within the blocks, which does run
        network.train()(picture())
        assert structure.unreached(network) == []


def test_detectors_that_call_blocks_by_another_name():
    """DetectoRS: the second pass of its backbone runs ``rfp_forward`` of blocks."""
    pytest.importorskip('mmdet.models')
    cfg = dict(depth=50, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3))
    cfg.update(conv_cfg=dict(type='ConvAWS'), rfp_inplanes=64, norm_eval=False)
    network = toolbox('mmdet', 'DetectoRS_ResNet', **cfg)()
    x = torch.randn(1, 3, 64, 64)
    features = network(x)
    try:
        attach_layer_attention(network, input_size=(64, 64))
        network.train()
        given = [torch.randn_like(f)[:, :64] for f in pad(features)]
        outs = network.rfp_forward(x, given)
        sum(out.square().mean() for out in outs).backward()
    except (ValueError, RuntimeError) as error:
        assert 'layer' in str(error)
        return
    without = [
        name
        for name, attention in layer_attentions(network).items()
        if all(param.grad is None for param in attention.parameters())
    ]
    assert structure.unreached(network) == without


def pad(features):
    return [F.pad(f, (0, 0, 0, 0, 0, max(0, 64 - f.shape[1]))) for f in features]


class LayerDrop(Ordinary):
    """Skips blocks in some passes."""

    skipped = ()

    def forward(self, x):
        x = self.stem(x)
        for index, block in enumerate(self.blocks()):
            if index not in self.skipped:
                x = block(x)
        return x


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('skipped', [(0,), (1,), (3,), (0, 1), (1, 3), (0, 1, 2, 3)])
def test_skipped_blocks(attention, skipped):
    """As a network that never had them, or refused; nothing of an earlier pass."""
    if attention.startswith('linformer'):
        pytest.skip('its projection belongs to the index of the block')
    torch.manual_seed(0)
    network = give(stir(LayerDrop()), attention, drop_path=0.0).double()
    for seed, module in enumerate(layer_attentions(network).values()):
        stir(module, seed)
    x = picture().double()
    network.eval()
    whole = run(network, x)
    network.skipped = skipped
    try:
        out = run(network, x)
    except RuntimeError as error:
        assert 'block' in str(error)
    else:
        twin = LayerDrop()
        twin.skipped = skipped
        twin = twin.double()
        left = [name for i, name in enumerate(ALL) if i not in skipped]
        if left:
            give(twin, attention, left, drop_path=0.0)
            mine = {k: v for k, v in network.state_dict().items()}
            keys = twin.state_dict()
            shared = attention.startswith('DLA') and 0 in skipped
            if shared:
                pytest.skip('what the attentions share is held by the first')
            twin.load_state_dict({k: mine[k] for k in keys})
        else:
            twin.load_state_dict(network.state_dict(), strict=False)
        twin.eval()
        assert gap(out, run(twin, x)) < 1e-9
    network.skipped = ()
    assert equal(run(network, x), whole)


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
def test_a_pass_takes_nothing_from_an_earlier_one(attention):
    """Whatever an earlier one has skipped: as the first pass, or refused as that."""
    torch.manual_seed(0)
    network = give(stir(LayerDrop()), attention, drop_path=0.0).eval()
    fresh = copy.deepcopy(network)
    x, draw = picture(), random.Random(0)

    def outcome(network, skipped):
        network.skipped = skipped
        try:
            return run(network, x)
        except RuntimeError as error:
            assert 'block' in str(error)
            return str(error)

    for _ in range(40):
        skipped = [i for i in range(4) if draw.random() < 0.5]
        out = outcome(network, skipped)
        first = outcome(copy.deepcopy(fresh), skipped)
        assert out == first if isinstance(first, str) else equal(out, first), skipped


# -- deploy forms --------------------------------------------------------------


REPARAMETERIZED = {
    'RepVGG': dict(
        arch=dict(
            num_blocks=[2, 3, 3, 1],
            width_factor=[0.125, 0.125, 0.125, 0.125],
            group_layer_map=None,
            se_cfg=None,
        ),
        out_indices=(0, 1, 2, 3),
    ),
    'MobileOne': dict(arch='s0', out_indices=(0, 1)),
}


@pytest.mark.parametrize('name', REPARAMETERIZED)
@pytest.mark.parametrize('attention', ['MRLABase', 'MRLALight', 'KCLA'])
def test_switching_to_deploy(name, attention):
    make = toolbox('mmpretrain', name, **REPARAMETERIZED[name])
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64).double()
    network = stir(make()).double()
    network.eval()
    before = run(network, x)
    network.switch_to_deploy()
    assert gap(run(network, x), before) < 1e-6

    network = stir(make())
    attach_layer_attention(network, AFTER_BLOCKS[attention], input_size=(64, 64))
    for seed, module in enumerate(layer_attentions(network).values()):
        stir(module, seed)
    network = network.double()
    network.eval()
    before = run(network, x)
    names = list(layer_attentions(network))
    network.switch_to_deploy()
    if attention == 'MRLALight':
        # The branch that was the identity of blocks with a stride is gone.
        with pytest.raises(RuntimeError, match='block .* has lost its'):
            run(network, x)
        return
    assert gap(run(network, x), before) < 1e-6
    assert list(layer_attentions(network)) == names


@pytest.mark.parametrize('name', ['repvit_m0_9', 'mobileone_s0'])
def test_reparameterizing_with_timm(name):
    """Modules are replaced by what they fuse to: right, or an error that says it."""
    timm = pytest.importorskip('timm')
    tools = pytest.importorskip('timm.utils.model')
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    network = timm.create_model(name, num_classes=4).eval()
    before = run(network, x)
    assert gap(run(tools.reparameterize_model(network), x), before) < 1e-3
    attach_layer_attention(network, input_size=(64, 64))
    network.eval()
    before = run(network, x)
    fused = tools.reparameterize_model(network)
    assert gap(run(fused, x), before) < 1e-3
    assert list(layer_attentions(fused)) == list(layer_attentions(network))


# -- names ---------------------------------------------------------------------


class HasOne(Block):
    """Has something of that name already."""

    def __init__(self):
        super().__init__()
        self.layer_attn = nn.Identity()


def test_a_block_that_has_a_layer_attn_of_its_own():
    with pytest.raises(ValueError, match='block0.*layer_attn'):
        give(of_blocks(HasOne)())


@pytest.mark.parametrize('name', ['timm.features', 'mmdet.HRNet', 'mmseg.UNet'])
def test_the_order_is_that_of_the_forward_pass(name):
    network = attached(name)
    ran = []
    for key in layer_attentions(network):
        block = network.get_submodule(key[: -len('.layer_attn')])
        block.register_forward_hook(lambda m, a, out, key=key: ran.append(key))
    run(network, image(name))
    assert list(layer_attentions(network)) == ran


def test_features_of_timm_are_those_of_the_network():
    """The same blocks, run by a loop over children."""
    whole = attach(plain('timm.resnet'), 'timm.resnet')
    features = plain('timm.features')
    attach(features, 'timm.features')
    features.load_state_dict(whole.state_dict(), strict=False)
    whole.eval(), features.eval()
    x = image('timm.features')
    seen = []
    whole.layer4.register_forward_hook(lambda module, args, out: seen.append(out))
    run(whole, x)
    assert torch.equal(run(features, x)[-1], seen[0])
